"""The parameters of a request for HTTP and gRPC. Each is declared once, with its type and its range.

Types are as strict as OpenAI's (a number in quotes is refused), and numbers are finite. What depends on the prompt or
on the model is checked in `build.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stagemesh.errors import InvalidRequest
from stagemesh.generation import Number, Sampling, in_words

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIASES = 1024

P = TypeVar("P", bound=BaseModel)


def _stops(told: Any) -> tuple[str, ...]:
    stops = [told] if isinstance(told, str) else [] if told is None else told
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise InvalidRequest("stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOPS} strings, not {len(stops)}", param="stop")
    if "" in stops:
        raise InvalidRequest("stop must not hold an empty string", param="stop")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARS:
        raise InvalidRequest(f"a stop string may have at most {MAX_STOP_CHARS} characters, not {longest}", param="stop")
    return tuple(stops)


def _biases(told: Any) -> Any:
    """Converts the keys of `logit_bias`, which are strings in JSON, to token ids."""
    if not isinstance(told, dict):
        return {} if told is None else told
    if len(told) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias may hold at most {MAX_BIASES} ids, not {len(told)}", param="logit_bias")
    for key in told:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
    return {int(key): bias for key, bias in told.items()}


class Params(Sampling):
    """The parameters of both protocols. None means the checkpoint's default, then OpenAI's."""

    model_config = ConfigDict(extra="allow")

    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """None: no log-probabilities. k: those of each sampled token and of the k likeliest."""
    logit_bias: Annotated[dict[int, Number], BeforeValidator(_biases)] = Field(default_factory=dict)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    timeout: Number | None = Field(None, gt=0)
    """Seconds until the request ends with DeadlineExceeded. The server's own limit applies too."""

    @property
    def longest(self) -> tuple[str, int | None]:
        """The client's name of the bound of the output, and the bound."""
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens as in `logprobs` above. None: no log-probabilities."""
        return self.logprobs


def parse(model: type[P], told: bytes | Mapping[str, Any]) -> P:
    """Reads JSON or values as `model`. Raises InvalidRequest, which names the first wrong field, its range and what was
    given."""
    try:
        return model.model_validate_json(told) if isinstance(told, bytes) else model.model_validate(told)
    except ValidationError as e:
        raise _in_words(e, model) from None


def _in_words(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return InvalidRequest(f"the body must be a JSON object: {first['msg']}")
    name, sentence = in_words(error, model)
    return InvalidRequest(f"'{name}' is required" if first["type"] == "missing" else sentence, param=name)
