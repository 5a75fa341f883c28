"""Speculative decoding: an option of gateway and coordinator. Its value is an object with vLLM's keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .base import Base

SPECULATIVE_EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
DEFAULT_LOOKUP = 5


def parse_json(value: Any) -> Any:
    """Parses a JSON object from a command line or an environment variable. Returns other values unchanged."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as e:
            raise ValueError(f"{value!r} is not JSON ({e}): write {SPECULATIVE_EXAMPLE}") from None
    return value


class SpeculativeConfig(Base):
    """Speculative decoding: tokens are guessed, and verified in one step."""

    method: Literal["ngram", "draft_model"]
    """ngram: the tokens that followed the last ones earlier in the prompt or the output. draft_model: the tokens that
    a small model on the last stage generates."""
    num_speculative_tokens: int = Field(ge=1, le=32)
    """Largest number of tokens that are guessed for one step."""
    model: str | None = None
    """The draft model's checkpoint: a directory, or an id on a hub (org/name, org/name@revision)."""
    prompt_lookup_max: int = Field(DEFAULT_LOOKUP, ge=1, le=32)
    """Longest n-gram that is looked up; default: prompt_lookup_min, or 5."""
    prompt_lookup_min: int = Field(DEFAULT_LOOKUP, ge=1, le=32)
    """Shortest n-gram that is looked up; default: prompt_lookup_max, or 5."""

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, values: Any) -> Any:
        """Fills in vLLM's defaults: a missing length takes the value of the other one."""
        if isinstance(values, SpeculativeConfig):
            return values
        if not isinstance(values, Mapping):
            raise ValueError(f"must be an object such as {SPECULATIVE_EXAMPLE}")
        least, most = values.get("prompt_lookup_min"), values.get("prompt_lookup_max")
        filled = {
            "prompt_lookup_min": least if least is not None else most if most is not None else DEFAULT_LOOKUP,
            "prompt_lookup_max": most if most is not None else least if least is not None else DEFAULT_LOOKUP,
        }
        return {**values, **filled}

    @model_validator(mode="after")
    def _agrees(self) -> SpeculativeConfig:
        if self.method == "draft_model" and not self.model:
            raise ValueError('method draft_model needs "model": the directory of the draft model, or its id on a hub')
        if self.method != "draft_model" and self.model:
            raise ValueError(f'"model" is for method draft_model, not {self.method}')
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min {self.prompt_lookup_min} must not exceed prompt_lookup_max {self.prompt_lookup_max}"
            )
        return self

    def __str__(self) -> str:
        """The config as the value of a flag."""
        return self.model_dump_json(exclude_none=True)


class Speculation(Base):
    """The option of speculative decoding. Each service checks that it supports the method."""

    speculative_config: SpeculativeConfig | None = None
    """Speculative decoding, as JSON with method and num_speculative_tokens. Method ngram (prompt lookup in the gateway)
    also takes prompt_lookup_max and prompt_lookup_min; method draft_model (a draft model on the last stage) takes
    model; default: off."""

    _json = field_validator("speculative_config", mode="before")(parse_json)
