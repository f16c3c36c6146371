"""Requests of the OpenAI API, and the sampling parameters they ask for.

Fields that are not listed here are ignored, as other servers do: clients send many. Those that would change the
answer and are not supported are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ..errors import UsageError
from ..runtime.sampling import SamplingParams

#: Tokens of a completion that states no length, as in OpenAI's API.
COMPLETION_TOKENS = 16
#: The text is searched for stop strings after every token, so they are few and short.
Stop = Annotated[str, Field(max_length=256)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completions share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = Field(None, max_length=1024)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    session_id: str | None = None

    def sampling(self, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        """The parameters; what is left out is as in OpenAI's API."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % 2**64,
            max_new_tokens=max_new_tokens,
            stop=stop,
            ignore_eos=self.ignore_eos,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
        )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.echo or self.suffix or (self.best_of or self.n) != self.n:
            raise ValueError("echo, suffix and best_of are not supported")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids, one for each prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if not prompt or isinstance(prompt[0], int) else prompt


class ChatRequest(Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("response_format other than text is not supported")
        taken = sorted({"self", "messages", "tools", "add_generation_prompt"} & set(self.chat_template_kwargs or ()))
        if taken:
            raise ValueError(f"chat_template_kwargs must not contain {taken[0]}")
        return self

    def plain_messages(self) -> list[dict[str, Any]]:
        """Messages with their content as one text, as chat templates take it."""
        return [{**m, "content": _text(m.get("content"))} for m in self.messages]

    def template_variables(self) -> dict[str, Any]:
        """What else the template sees."""
        tools = None if self.tool_choice == "none" else self.tools
        return {**(self.chat_template_kwargs or {}), **({"tools": tools} if tools else {})}


class TokenizeRequest(BaseModel):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    tokens: list[int]


def _text(content: Any) -> str:
    """The content of a message: a text, nothing, or parts that are all texts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise UsageError("messages hold text only: parts of other types are not supported")
    return "".join(p["text"] for p in parts)
