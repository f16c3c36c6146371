"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

#: Longest body of a request, in bytes, and the seconds that it may take to arrive.
MAX_BODY, BODY_SECONDS = 4 << 20, 30.0
#: Bytes of all bodies that are held at a time.
MAX_BODIES = 64 << 20
#: Seconds that the head of a request may take to arrive.
HEAD_SECONDS = 15.0
#: Longest prompt, unless the server is told otherwise.
MAX_PROMPT = 32768
#: Seconds a client that is refused because the queue is full should wait.
RETRY_SECONDS = 1


@dataclass(frozen=True)
class ServerOptions:
    """How requests are taken.

    Args:
        model_name: the model's name in requests and replies.
        api_key: what clients must send as a bearer token; None takes everybody. Spaces around it do not count.
        max_prompt_tokens: longest prompt; None leaves it to the artifact. Prompts that are fed at the same time
            take turns, so that a long one slows the others.
        max_new_tokens: longest answer, and that of a chat that states no length.
        timeout: seconds that a request may take in all.
        cors: origins whose pages may call the server; "*" is all.
        state_dir: folder of saved sessions, or a URL of fsspec; None offers no sessions.
        state_limit: bytes that saved sessions may take.
        log_prompts: whether the log shows prompts.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    max_prompt_tokens: int | None = MAX_PROMPT
    max_new_tokens: int = 2048
    timeout: float = 600.0
    cors: tuple[str, ...] = ()
    state_dir: Path | str | None = None
    state_limit: int = 10 * 10**9
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens", "timeout", "state_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
        if self.api_key is not None:
            object.__setattr__(self, "api_key", self.api_key.strip())  # as in the headers of clients
        if self.api_key == "":
            raise UsageError("the API key is empty: leave it out to take everybody")
