"""What a checkpoint says about generation: sampling parameters, the bound of an output, ids that end a sequence.

The ranges of sampling parameters are declared here, once: those of requests (`gateway/api/params.py`), too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from stagemesh.errors import CheckpointError
from stagemesh.hub.substitute import in_its_place
from stagemesh.models.size import text_config

GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
BOUNDS = {"gt": "more than", "ge": "at least", "le": "at most"}
"""Words for a field's bound in error messages."""
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than_equal")
TYPES = {"float_type": "a number", "int_type": "a whole number", "int_from_float": "a whole number"}
"""What a value of the wrong type must be, by pydantic's type of error."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class Sampling(BaseModel):
    """The sampling parameters that a checkpoint has defaults for. None: not given."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    temperature: Number | None = Field(None, ge=0)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """As in vLLM, -1 means all tokens."""
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0)


class GenerationConfig(Sampling):
    """The keys of generation_config.json that count. As in vLLM, `do_sample`, `max_length` and others do not."""

    top_p: Number | None = Field(None, ge=0, le=1)
    """As in transformers, 0 leaves the likeliest token alone."""
    max_new_tokens: int | None = Field(None, ge=1)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that are given."""
        return self.model_dump(include=set(Sampling.model_fields), exclude_none=True)


def generation_config(model_dir: Path) -> GenerationConfig:
    """Reads generation_config.json, which a checkpoint may lack. Raises CheckpointError (file, key, what is wrong)."""
    path = model_dir / GENERATION_CONFIG
    try:
        return GenerationConfig.model_validate(read_json(path))
    except ValidationError as e:
        _, wrong = in_words(e, GenerationConfig, TYPES)
        raise CheckpointError(f"{path}: {wrong}; correct it, or remove it") from None


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """The ids that end a sequence: `eos_token_id` (one or several) of generation_config.json, else of config.json.

    Raises CheckpointError for a value that is neither an id of the vocabulary nor a list of such ids.
    """
    config = text_config(read_json(model_dir / CONFIG))
    size = config.get("vocab_size")
    for name in (GENERATION_CONFIG, CONFIG):
        told = read_json(model_dir / name)
        value = told.get("eos_token_id")
        if value is None:
            value = text_config(told).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 and (type(size) is not int or i < size) for i in ids):
            bound = f" below vocab_size {size}" if type(size) is int else ""
            raise CheckpointError(
                f"{model_dir / name}: eos_token_id must be a token id{bound}, or a list of such ids, not "
                f"{json.dumps(value)[:60]}; correct it, or remove it"
            )
        return frozenset(ids)
    return frozenset()


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in the JSON file at `path`; empty when there is no such file. Raises CheckpointError."""
    data = b""
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        if other := in_its_place(data):
            raise CheckpointError(f"{path} is {other}") from e
        raise CheckpointError(f"{path}: not valid JSON ({e}); fetch the file again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, not a {type(value).__name__}; fetch the file again")
    return value


def in_words(
    error: ValidationError, model: type[BaseModel], types: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str]:
    """The first wrong field of `model`, and a sentence on what it must be and what was given.

    `types`: own words for errors of type, as `TYPES`. Without an entry, pydantic's words are used.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    kind, message, given = first["type"], first["msg"], first.get("input")
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) and len(repr(given)) <= 60 else ""
    if kind in OUT_OF_RANGE:
        return name, f"{name} must be {_range(model.model_fields[name])}, not {given}"
    if kind == "finite_number":
        return name, f"{name} must be a finite number"
    if kind in types:
        return name, f"{name} must be {types[kind]}{shown}"
    return name, f"'{name}': {message[:1].lower()}{message[1:]}{shown}"


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(bound, kind)}"
        for kind, words in BOUNDS.items()
        for bound in field.metadata
        if hasattr(bound, kind)
    ]
    return " and ".join(bounds)
