"""Requests of the OpenAI API, and the sampling parameters they ask for.

Fields that are not listed here are ignored, as other servers do: clients send many. Those that would change the
answer and are not supported are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from ..errors import UsageError, one_line
from ..runtime.sampling import SamplingParams
from ..runtime.structured import Grammar, Grammars

#: Tokens of a completion that states no length, as in OpenAI's API.
COMPLETION_TOKENS = 16
#: The text is searched for stop strings after every token, so they are few and short.
Stop = Annotated[str, Field(max_length=256)]
#: A list ends at its first error: a body may hold a million of them, and a union collects those of every branch.
Ids = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
#: Most tokens that ``stop_token_ids`` and ``logit_bias`` name.
MOST_IDS = 1024


#: Fields of this API or of other servers' that change the answer, and are not supported.
_REFUSED = (
    "bad_words",
    "function_call",
    "functions",
    "min_tokens",
    "structured_outputs",
    "use_beam_search",
)


#: Fields that give the form of an answer, as vLLM's clients write them.
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class _Body(BaseModel):
    """A body in which null is the same as nothing, as clients of many languages write it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class StreamOptions(_Body):
    include_usage: bool = False


class SchemaFormat(_Body):
    """A JSON schema; whether it is called strict or not, answers keep to it."""

    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema")
        return self


class Request(_Body):
    """What both kinds of completions share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_IDS, fail_fast=True)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    session_id: str | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    guided_grammar: str | None = None
    live_view: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        """Refuse what would change the answer, unless it has the value that changes nothing."""
        for name in _REFUSED if isinstance(body, dict) else ():
            if body.get(name) not in (None, False, 0):
                raise ValueError(f"{name} is not supported")
        return body

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        """A dictionary collects the errors of all its entries."""
        if isinstance(value, dict) and len(value) > MOST_IDS:
            raise ValueError(f"it has {len(value)} entries, and at most {MOST_IDS} are taken")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Request:
        forms = [name for name in _GUIDED if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            forms.append("response_format")
        if len(forms) > 1:
            raise ValueError(f"give either {forms[0]} or {forms[1]}")
        if forms and self.ignore_eos:
            raise ValueError(f"ignore_eos is not possible with {forms[0]}: its answers end by eos")
        return self

    def grammar(self, grammars: Callable[[], Grammars]) -> Grammar | None:
        """The form of the answer, if it has to have one."""
        wanted = self.response_format
        if self.guided_json is not None:
            return grammars().json_schema(_schema(self.guided_json))
        if self.guided_regex is not None:
            return grammars().regex(self.guided_regex)
        if self.guided_choice is not None:
            return grammars().choice(self.guided_choice)
        if self.guided_grammar is not None:
            return grammars().lark(self.guided_grammar)
        if wanted is None or wanted.type == "text":
            return None
        return grammars().json_schema(wanted.json_schema.content) if wanted.json_schema else grammars().json_object()

    def sampling(self, max_new_tokens: int, logprobs: int | None, grammar: Grammar | None) -> SamplingParams:
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
            processors=() if grammar is None else (grammar,),
        )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    prompt: str | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
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
    messages: Annotated[Objects, Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Objects | None = None
    tool_choice: Literal["none", "auto"] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
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


class TokenizeRequest(_Body):
    prompt: str | None = None
    messages: Annotated[Objects, Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    tokens: Ids


def _schema(schema: dict[str, Any] | str) -> dict[str, Any]:
    """A JSON schema that may be written as a text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"guided_json is not JSON: {one_line(error)}") from None
    if not isinstance(schema, dict):
        raise UsageError("guided_json must be a JSON schema, an object")
    return schema


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
