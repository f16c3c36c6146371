"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

#: Longest body of a request, in bytes, and the seconds that it may take to arrive.
MAX_BODY, BODY_SECONDS = 4 << 20, 30.0
#: Seconds that the head of a request may take to arrive.
HEAD_SECONDS = 15.0
#: Seconds a client that is refused because the queue is full should wait.
RETRY_SECONDS = 1


@dataclass(frozen=True)
class ServerOptions:
    """How requests are taken.

    Args:
        model_name: the model's name in requests and replies.
        api_key: what clients must send as a bearer token; None takes everybody.
        max_prompt_tokens: longest prompt; None leaves it to the artifact.
        max_new_tokens: longest answer, and that of a chat that states no length.
        timeout: seconds that a request may take in all.
        cors: origins whose pages may call the server; "*" is all.
        state_dir: folder of saved sessions; None offers no sessions.
        state_limit: bytes that saved sessions may take.
        log_prompts: whether the log shows prompts.
    """

    model_name: str
    api_key: str | None = None
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 2048
    timeout: float = 600.0
    cors: tuple[str, ...] = ()
    state_dir: Path | None = None
    state_limit: int = 10 * 10**9
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens", "timeout", "state_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
        if self.api_key == "":
            raise UsageError("the API key is empty: leave it out to take everybody")
