"""Checks parameters against the prompt and the model, and builds `GenerationRequest`s, for HTTP and gRPC."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from stagemesh.errors import InvalidRequest, NotFound, PromptTooLong, Unavailable
from stagemesh.protos.v1.types_pb2 import SamplingParams

from ..text.tokenizer import LONG_CHARS
from .params import MAX_STOP_IDS, Params
from .request import Engine, GenerationRequest, ServedModel

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of max_tokens for a completion."""
MAX_BIAS = 100
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
"""vLLM's defaults that are not 0. A checkpoint's defaults override them."""
SMALLEST_TOP_P = 2.0**-126
"""Smallest normal number of 32 bits. It leaves the likeliest token alone. In a `SamplingParams`, 0 means all tokens."""


def served(engine: Engine, name: str | None) -> ServedModel:
    """The served model. `name` may be None or empty. Raises NotFound, Unavailable."""
    model = engine.model
    if model is None:
        raise Unavailable(f"no model is served yet: {engine.ready()[1]}", retry_after_s=1.0)
    if name and name != model.name:
        raise NotFound(f"the model {name!r} does not exist; this server has {model.name!r}", param="model")
    return model


async def encode(model: ServedModel, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of `text`. An empty text has none, not even a special one.

    Raises InvalidRequest, or PromptTooLong. A text that is far too long is not tokenized.
    """
    tokenizer = model.tokenizer
    if not text:
        return ()
    if len(text) < LONG_CHARS:
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    # In a thread: it would block the event loop for tens of milliseconds.
    fewest = await asyncio.to_thread(tokenizer.fewest_tokens, text)
    if fewest >= model.max_model_len:
        raise _too_long(model, f"at least {fewest}", "")
    return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens))


async def render_chat(
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids of a conversation. The chat template writes the special tokens. Raises InvalidRequest."""
    template = model.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            f"the model {model.name!r} has no chat template, so it takes no conversations; use /v1/completions",
            param="messages",
        )
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    text = template.render(messages, add_generation_prompt=add_generation_prompt, extra=extra)
    return await encode(model, text, add_special_tokens=add_special_tokens)


def build(
    request_id: str, prompt: Sequence[int], p: Params, model: ServedModel, *, timeout_s: float, fill_context: bool
) -> GenerationRequest:
    """Checks the parameters, and builds the request. A seed is drawn if the client gave none.

    `timeout_s`: the longest that a request may take. `fill_context`: whether an output that neither the request nor the
    checkpoint bounds may fill the context (a chat), or has 16 tokens at most (a completion). Raises InvalidRequest,
    which names the field and its range, and PromptTooLong with all numbers.
    """
    _check_prompt(prompt, model)
    max_tokens = _max_tokens(len(prompt), p, model, fill_context)
    stop_ids = p.stop_token_ids or []
    _check("min_tokens", p.min_tokens or 0, max_tokens, "max_tokens")
    if len(stop_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"stop_token_ids may hold at most {MAX_STOP_IDS} ids, not {len(stop_ids)}", param="stop_token_ids"
        )
    for token in stop_ids:
        _check("stop_token_ids", token, model.vocab_size - 1, "the last id of the vocabulary")
    ends = frozenset(stop_ids) | (frozenset() if p.ignore_eos else _eos_ids(model))
    return GenerationRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        sampling=_sampling(p, model, ends),
        max_tokens=max_tokens,
        n=p.n or 1,
        stop=p.stop,
        stop_token_ids=ends,
        include_stop_str_in_output=bool(p.include_stop_str_in_output),
        skip_special_tokens=p.skip_special_tokens is not False,
        deadline_s=min(p.timeout or timeout_s, timeout_s),
    )


def _eos_ids(model: ServedModel) -> frozenset[int]:
    """End-of-sequence ids that can be drawn: a checkpoint may name some that its vocabulary does not have."""
    return frozenset(token for token in model.tokenizer.eos_ids if token < model.vocab_size)


def _check_prompt(prompt: Sequence[int], model: ServedModel) -> None:
    if not prompt:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(
            f"the prompt holds token id {wrong}, which is outside the vocabulary (0 to {model.vocab_size - 1})",
            param="prompt",
        )


def _max_tokens(prompt: int, p: Params, model: ServedModel, fill_context: bool) -> int:
    room = model.max_model_len - prompt
    if room < 1:
        raise _too_long(model, str(prompt), "; at least one more is needed for the output")
    name, wanted = p.longest
    if wanted is None:
        return min(room, model.tokenizer.generation.max_new_tokens or (room if fill_context else COMPLETION_MAX_TOKENS))
    if wanted > room:
        raise _too_long(
            model, str(prompt), f" and {name} asks for {wanted}: {prompt + wanted} together", f" or lower {name}", name
        )
    return wanted


def _too_long(model: ServedModel, prompt: str, rest: str, remedy: str = "", param: str = "prompt") -> PromptTooLong:
    return PromptTooLong(
        f"this model's maximum context length is {model.max_model_len} tokens, but the prompt has {prompt} "
        f"tokens{rest}. Shorten the prompt{remedy}.",
        param=param,
    )


def _sampling(p: Params, model: ServedModel, stop_ids: frozenset[int]) -> SamplingParams:
    for token, bias in p.logit_bias.items():
        _check("logit_bias", token, model.vocab_size - 1, "the last id of the vocabulary")
        if abs(bias) > MAX_BIAS:
            raise InvalidRequest(
                f"logit_bias must be at least -{MAX_BIAS} and at most {MAX_BIAS}, not {bias:g}", param="logit_bias"
            )
    # Only declared fields: an unknown key may have any name.
    names = SamplingParams.DESCRIPTOR.fields_by_name.keys() & Params.model_fields.keys()
    asked = {**DEFAULTS, **model.tokenizer.generation.sampling, **p.model_dump(include=names, exclude_none=True)}
    top_k = asked.get("top_k", 0)
    asked |= {
        "top_p": max(asked["top_p"], SMALLEST_TOP_P),
        "top_k": top_k if 0 <= top_k < model.vocab_size else 0,
        # A negative seed becomes the unsigned number with the same bits.
        "seed": secrets.randbits(32) if p.seed is None else p.seed % 2**64,
        "logprobs": p.num_logprobs is not None,
        "top_logprobs": min(p.num_logprobs or 0, model.vocab_size),
    }
    return SamplingParams(
        **asked,
        suppressed_ids=sorted(stop_ids) if p.min_tokens else [],
        bias_ids=sorted(p.logit_bias),
        bias_values=[bias for _, bias in sorted(p.logit_bias.items())],
    )


def _check(name: str, value: int, high: int, high_is: str) -> None:
    if not 0 <= value <= high:
        raise InvalidRequest(f"{name} must be at least 0 and at most {high} ({high_is}), not {value}", param=name)
