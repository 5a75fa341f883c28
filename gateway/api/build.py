"""Checks parameters and builds `GenerationRequest`s, for HTTP and gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from stagemesh.errors import InvalidRequest, NotFound, PromptTooLong, Unavailable

from ..text.tokenizer import LONG_CHARS, Tokenizer
from .request import Engine, GenerationRequest, ModelCard, Sampling

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of max_tokens for a completion."""
SLOW_TEXT_CHARS = LONG_CHARS
"""Longer texts are tokenized in a thread: they would block the event loop for tens of milliseconds."""


@dataclass(frozen=True)
class RequestParams:
    """Parameters of a request, independent of the protocol. None takes the checkpoint's default, then OpenAI's."""

    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    """The client's name for it, for error messages."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    """None: no log-probabilities. k: those of each sampled token and of the k likeliest."""
    logprobs_param: str = "logprobs"
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    timeout_s: float | None = None


SAME_IN_BOTH = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
)
"""Optional parameters that have the same name and meaning in both protocols."""


def served(engine: Engine, name: str | None) -> tuple[ModelCard, Tokenizer]:
    """The served model and its tokenizer. `name` may be None or empty. Raises NotFound, Unavailable."""
    model, tokenizer = engine.model, engine.tokenizer
    if model is None or tokenizer is None:
        raise Unavailable(f"no model is served yet: {engine.ready()[1]}", retry_after_s=1.0)
    if name and name != model.name:
        raise NotFound(f"the model {name!r} does not exist; this server has {model.name!r}", param="model")
    return model, cast(Tokenizer, tokenizer)


async def encode(tokenizer: Tokenizer, model: ModelCard, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of `text`. Raises InvalidRequest, or PromptTooLong; a text that is far too long is not tokenized."""
    if len(text) < SLOW_TEXT_CHARS:
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    fewest = await asyncio.to_thread(tokenizer.fewest_tokens, text)
    if fewest >= model.max_model_len:
        raise _too_long(model, f"at least {fewest}", "")
    return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens))


async def render_chat(
    tokenizer: Tokenizer,
    model: ModelCard,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids of a conversation. The chat template writes the special tokens. Raises InvalidRequest."""
    template = tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            f"the model {model.name!r} has no chat template, so it takes no conversations; use /v1/completions",
            param="messages",
        )
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    text = template.render(messages, add_generation_prompt=add_generation_prompt, extra=extra)
    return await encode(tokenizer, model, text, add_special_tokens=add_special_tokens)


def build(
    request_id: str,
    prompt: Sequence[int],
    p: RequestParams,
    model: ModelCard,
    tokenizer: Tokenizer,
    *,
    request_timeout_s: float,
    fill_context: bool,
) -> GenerationRequest:
    """Checks the parameters, and builds the request.

    `fill_context`: whether an output without max_tokens may fill the context (a chat), or has 16 tokens at most (a
    completion). Raises InvalidRequest, which names the field and its range, and PromptTooLong with all numbers.
    """
    _check_prompt(prompt, model)
    max_tokens = _max_tokens(len(prompt), p, model, fill_context)
    _whole("n", p.n, 1, MAX_CHOICES)
    _whole("min_tokens", p.min_tokens, 0, max_tokens, " (max_tokens)")
    _check_stops(p, model)
    timeout_s = request_timeout_s
    if p.timeout_s is not None:
        _number("timeout", p.timeout_s, 0, math.inf, open_below=True)
        timeout_s = min(p.timeout_s, request_timeout_s)
    return GenerationRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        sampling=_sampling(p, model, tokenizer),
        max_tokens=max_tokens,
        n=1 if p.n is None else p.n,
        stop=tuple(p.stop),
        stop_token_ids=frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else _eos_ids(model, tokenizer)),
        min_tokens=p.min_tokens,
        include_stop_str_in_output=p.include_stop_str_in_output,
        skip_special_tokens=p.skip_special_tokens,
        deadline_s=timeout_s,
    )


def _eos_ids(model: ModelCard, tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-sequence ids that can be drawn: a checkpoint may name some that its vocabulary does not have."""
    return frozenset(token for token in tokenizer.eos_ids if token < model.vocab_size)


def _check_prompt(prompt: Sequence[int], model: ModelCard) -> None:
    if not prompt:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(
            f"the prompt holds token id {wrong}, which is outside the vocabulary (0 to {model.vocab_size - 1})",
            param="prompt",
        )


def _max_tokens(prompt: int, p: RequestParams, model: ModelCard, fill_context: bool) -> int:
    room = model.max_model_len - prompt
    if room < 1:
        raise _too_long(model, str(prompt), "; at least one more is needed for the output")
    if p.max_tokens is None:
        return room if fill_context else min(room, COMPLETION_MAX_TOKENS)
    if p.max_tokens < 1:
        raise InvalidRequest(f"{p.max_tokens_param} must be at least 1, not {p.max_tokens}", param=p.max_tokens_param)
    if p.max_tokens > room:
        asked = f" and {p.max_tokens_param} asks for {p.max_tokens}: {prompt + p.max_tokens} together"
        raise _too_long(model, str(prompt), asked, p.max_tokens_param)
    return p.max_tokens


def _too_long(model: ModelCard, prompt: str, rest: str, param: str = "prompt") -> PromptTooLong:
    return PromptTooLong(
        f"this model's maximum context length is {model.max_model_len} tokens, but the prompt has {prompt} "
        f"tokens{rest}. Shorten the prompt" + ("." if param == "prompt" else f" or lower {param}."),
        param=param,
    )


def _check_stops(p: RequestParams, model: ModelCard) -> None:
    if len(p.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOPS} strings, not {len(p.stop)}", param="stop")
    for stop in p.stop:
        if not stop:
            raise InvalidRequest("stop must not hold an empty string", param="stop")
        if len(stop) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string may have at most {MAX_STOP_CHARS} characters, not {len(stop)}", param="stop"
            )
    if len(p.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"stop_token_ids may hold at most {MAX_STOP_IDS} ids, not {len(p.stop_token_ids)}", param="stop_token_ids"
        )
    for token in p.stop_token_ids:
        _whole("stop_token_ids", token, 0, model.vocab_size - 1, " (the last id of the vocabulary)")


def _sampling(p: RequestParams, model: ModelCard, tokenizer: Tokenizer) -> Sampling:
    default = tokenizer.defaults.sampling
    _number("temperature", p.temperature, 0, math.inf)
    _number("top_p", p.top_p, 0, 1, open_below=True)
    _number("min_p", p.min_p, 0, 1)
    _number("presence_penalty", p.presence_penalty, -2, 2)
    _number("frequency_penalty", p.frequency_penalty, -2, 2)
    _number("repetition_penalty", p.repetition_penalty, 0, math.inf, open_below=True)
    _whole("top_k", p.top_k, -1, 2**31 - 1)
    _whole("seed", p.seed, -(2**63), 2**64 - 1)
    _whole(p.logprobs_param, p.logprobs, 0, MAX_TOP_LOGPROBS)
    if len(p.logit_bias) > MAX_BIASES:
        raise InvalidRequest(
            f"logit_bias may hold at most {MAX_BIASES} ids, not {len(p.logit_bias)}", param="logit_bias"
        )
    for token, bias in p.logit_bias.items():
        _whole("logit_bias", token, 0, model.vocab_size - 1, " (the last id of the vocabulary)")
        _number("logit_bias", bias, -100, 100)
    top_k = default.top_k if p.top_k is None else p.top_k
    return Sampling(
        temperature=_or(p.temperature, default.temperature),
        top_p=_or(p.top_p, default.top_p),
        # As in vLLM, -1 means all tokens.
        top_k=0 if top_k < 0 or top_k >= model.vocab_size else top_k,
        min_p=_or(p.min_p, default.min_p),
        presence_penalty=_or(p.presence_penalty, default.presence_penalty),
        frequency_penalty=_or(p.frequency_penalty, default.frequency_penalty),
        repetition_penalty=_or(p.repetition_penalty, default.repetition_penalty),
        # A negative seed becomes the unsigned number with the same bits.
        seed=None if p.seed is None else p.seed % 2**64,
        logprobs=p.logprobs is not None,
        top_logprobs=min(p.logprobs or 0, model.vocab_size),
        logit_bias=tuple(sorted(p.logit_bias.items())),
    )


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _number(name: str, value: float | None, low: float, high: float, *, open_below: bool = False) -> None:
    if value is None or (math.isfinite(value) and (low < value if open_below else low <= value) and value <= high):
        return
    above = f"more than {low:g}" if open_below else f"at least {low:g}"
    most = "" if math.isinf(high) else f" and at most {high:g}"
    raise InvalidRequest(f"{name} must be {above}{most}, not {value:g}", param=name)


def _whole(name: str, value: int | None, low: int, high: int, high_is: str = "") -> None:
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{name} must be at least {low} and at most {high}{high_is}, not {value}", param=name)
