"""The request bodies of OpenAI's two generating endpoints, with vLLM's extensions.

Unknown keys are ignored, as OpenAI does. Keys in `REFUSED` are known but not supported: they would change the output,
so ignoring them would mislead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stagemesh.errors import InvalidRequest
from stagemesh.gateway.api.params import MAX_TOP_LOGPROBS, Params

STRUCTURED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
REFUSED: dict[str, str] = {
    "tools": "tools are not supported",
    "functions": "functions are not supported",
    "suffix": "a suffix (fill in the middle) is not supported",
    "audio": "audio is not supported",
    "prediction": "predicted outputs are not supported",
    **dict.fromkeys(STRUCTURED, "structured output is not supported"),
    "use_beam_search": "beam search is not supported",
    "prompt_logprobs": "log-probabilities of the prompt are not supported",
    "truncate_prompt_tokens": "truncating the prompt is not supported",
    "chat_template": "a template in the request is not supported; the checkpoint's own is used",
    "continue_final_message": "continuing the final message is not supported",
    "bad_words": "bad_words is not supported; use logit_bias",
    "allowed_token_ids": "allowed_token_ids is not supported; use logit_bias",
}
"""Keys that are refused, with the reason, unless their value is null, false or empty."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ResponseFormat(BaseModel):
    """`response_format`. Only text is supported."""

    model_config = ConfigDict(strict=True)

    type: str


class Common(Params):
    """The fields that both bodies have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None

    def check_supported(self) -> None:
        """Raises InvalidRequest for what this server does not support."""
        for key, value in (self.model_extra or {}).items():
            if key in REFUSED and value:
                raise InvalidRequest(f"{REFUSED[key]} by this server", param=key)
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequest(
                f"response_format {self.response_format.type!r} is not supported by this server; only 'text' is",
                param="response_format",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")


class CompletionRequest(Common):
    """Body of POST /v1/completions."""

    prompt: Any = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def check_supported(self) -> None:
        """Raises InvalidRequest for what this server does not support."""
        super().check_supported()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                f"best_of must equal n here ({self.n or 1}), not {self.best_of}: choices are not ranked",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo with logprobs is not supported by this server", param="echo")


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Any = None


class ChatCompletionRequest(Common):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tool_choice: Any = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check_supported(self) -> None:
        """Raises InvalidRequest for what this server does not support."""
        super().check_supported()
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("tools are not supported by this server", param="tool_choice")
        if self.modalities is not None and self.modalities != ["text"]:
            raise InvalidRequest("the only modality of this server is 'text'", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")

    @property
    def longest(self) -> tuple[str, int | None]:
        """`max_completion_tokens` overrides the older `max_tokens`."""
        if self.max_completion_tokens is None:
            return super().longest
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None: no log-probabilities. k: those of each sampled token and of the k likeliest."""
        return (self.top_logprobs or 0) if self.logprobs else None


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The supported roles. `developer` is OpenAI's newer name of `system`; templates know the latter."""


def turns(messages: Iterable[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Raises InvalidRequest for unsupported roles and parts."""
    return [_turn(i, message) for i, message in enumerate(messages)]


def _turn(i: int, message: ChatMessage) -> dict[str, Any]:
    where = f"messages[{i}]"
    role = ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role must be 'system', 'user' or 'assistant', not {message.role!r}", param=f"{where}.role"
        )
    extra = message.model_extra or {}
    if extra.get("tool_calls") or extra.get("function_call"):
        raise InvalidRequest(f"{where}: tool calls are not supported by this server", param=f"{where}.tool_calls")
    turn: dict[str, Any] = {"role": role, "content": _text(message.content, f"{where}.content")}
    if isinstance(extra.get("name"), str):
        turn["name"] = extra["name"]
    return turn


def _text(content: Any, where: str) -> str:
    """A message's content as one string. Text parts are joined by line breaks, as in vLLM."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of text parts", param=where)
    texts: list[str] = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            shown = repr(kind) if isinstance(kind, str) else "something else"
            raise InvalidRequest(
                f"{where}[{j}] must be a part of type 'text', not {shown}: this model reads text only",
                param=f"{where}[{j}]",
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}[{j}].text must be a string", param=f"{where}[{j}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts in `prompt`, which is a text, token ids, or a list of either. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _all_ids(prompt):
            return [prompt]
        if all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) and _all_ids(p) for p in prompt):
            return prompt
    if prompt in (None, []):
        raise InvalidRequest("the prompt is empty: give a text or a list of token ids as 'prompt'", param="prompt")
    raise InvalidRequest(
        "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
        param="prompt",
    )


def _all_ids(values: Sequence[Any]) -> bool:
    return all(type(v) is int for v in values)
