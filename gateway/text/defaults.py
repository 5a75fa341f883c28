"""Sampling defaults and end-of-sequence ids of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagemesh.errors import CheckpointError

DEFAULTS = ("temperature", "top_p", "min_p", "repetition_penalty", "top_k")


def sampling_defaults(model_dir: Path) -> dict[str, Any]:
    """The sampling parameters of `model_dir`/generation_config.json, which a client's own values override.

    As in vLLM, only its numbers count; `do_sample` does not. Raises CheckpointError for a file that is not JSON, or a
    value that is not a number.
    """
    told = read_json(model_dir / "generation_config.json")
    values: dict[str, Any] = {}
    for name in DEFAULTS:
        value = told.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{model_dir / 'generation_config.json'}: {name} must be a number, not {value!r}")
        values[name] = max(0, int(value)) if name == "top_k" else float(value)
    return values


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """The ids that end a sequence: `eos_token_id` (one or several) of generation_config.json, else of config.json.

    Raises CheckpointError for a value that is neither an id nor a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        told = read_json(model_dir / name)
        value = told.get("eos_token_id")
        if value is None and isinstance(told.get("text_config"), dict):
            value = told["text_config"].get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(f"{model_dir / name}: eos_token_id must be an id or a list of ids, not {value!r}")
        return frozenset(ids)
    return frozenset()


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in the JSON file at `path`; empty when there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
