"""The parameters of a request for HTTP and gRPC. Each is declared once, with its type and its range.

Types are as strict as OpenAI's (a number in quotes is refused), and numbers are finite. What depends on the prompt or
on the model is checked in `build.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from stagemesh.errors import InvalidRequest

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
BOUNDS = {"gt": "more than", "ge": "at least", "le": "at most"}
"""Words for a field's bound in error messages."""
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than_equal")

P = TypeVar("P", bound=BaseModel)
Number = Annotated[float, Field(allow_inf_nan=False)]


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


class Params(BaseModel):
    """The parameters of both protocols. None means the checkpoint's default, then OpenAI's."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    max_tokens: int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """As in vLLM, -1 means all tokens."""
    min_p: Number | None = Field(None, ge=0, le=1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, gt=0)
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
    kind, message, given = first["type"], first["msg"], first.get("input")
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    if kind == "missing":
        return InvalidRequest(f"'{name}' is required", param=name)
    if not name:
        return InvalidRequest(f"the body must be a JSON object: {message}")
    if kind == "finite_number":
        return InvalidRequest(f"{name} must be a finite number", param=name)
    if kind in OUT_OF_RANGE:
        return InvalidRequest(f"{name} must be {_range(model.model_fields[name])}, not {given}", param=name)
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) and len(repr(given)) <= 60 else ""
    return InvalidRequest(f"'{name}': {message[:1].lower()}{message[1:]}{shown}", param=name)


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(bound, kind)}"
        for kind, words in BOUNDS.items()
        for bound in field.metadata
        if hasattr(bound, kind)
    ]
    return " and ".join(bounds)
