"""Loads settings, by priority: flags > environment (`STAGEMESH_*`) > YAML file > defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from stagemesh.errors import ConfigError

from .base import Base
from .speculative import SpeculativeConfig

S = TypeVar("S", bound=Base)


def load(cls: type[S], *, file: str | None, env: Mapping[str, str] = os.environ, given: Mapping[str, Any]) -> S:
    """Loads settings of class `cls` from flags `given`, then `env`, then the YAML `file`.

    Raises a ConfigError that names each wrong field, where it came from, and what it should be.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = yaml.safe_load(Path(file).read_text()) or {}
        except (OSError, yaml.YAMLError) as e:
            raise ConfigError(f"cannot read settings from {file}: {e}") from e
        if not isinstance(values, dict):
            raise ConfigError(f"{file} must hold `key: value` lines, not a {type(values).__name__}")
    origin = dict.fromkeys(values, f"in {file}")
    for key in cls.model_fields:
        variable = "STAGEMESH_" + key.upper()
        if variable in env:
            values[key], origin[key] = env[variable], f"in ${variable}"
    for key, value in given.items():
        values[key], origin[key] = value, f"in --{key.replace('_', '-')}"
    try:
        return cls.model_validate(values)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(error, origin, cls) for error in e.errors())) from e


def _explain(error: Any, origin: Mapping[str, str], cls: type[Base]) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = SpeculativeConfig if key == "speculative_config" else cls
        return f"unknown setting {path!r} {origin.get(key, '')}; known: {', '.join(sorted(known.model_fields))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{path} {origin.get(key, '')}: {message}".strip() if key else message
