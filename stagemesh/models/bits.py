"""The bits that a quantized weight takes with its scales, by method: from a configuration alone. Pure.

What headers of weights say goes before it (stagemesh/checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .size import Part

KEYS = ("quantization_config", "compression_config", "quantization")
LOADED = {"int8": 8.0, "fp8": 8.0, "int4": 4.25}
"""Bits by a method of --quantization. A row has one scale, and with int4 16 + 16 bits for each 128 columns: a
scale and a zero point."""


def bits_of(configs: Mapping[str, Mapping[str, Any]]) -> tuple[float, bool] | None:
    """Returns the bits of a quantized weight, and whether only routed experts are quantized. None: no known method.

    `configs`: the files that may say it, by name.
    """
    for config in configs.values():
        nested = config.get("text_config")
        for part in (config, nested if isinstance(nested, dict) else {}):
            settings = next((part[key] for key in KEYS if isinstance(part.get(key), dict)), None)
            if settings is not None and (bits := _bits(settings)) is not None:
                skipped = settings.get("modules_to_not_convert") or settings.get("ignore") or ()
                return bits, any("self_attn" in str(name) for name in skipped)
    return None


def _bits(settings: Mapping[str, Any]) -> float | None:
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "").lower()
    if method in ("gptq", "awq"):
        return _grouped(settings.get("bits", 4), settings.get("group_size", 128), zero_points=True)
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        weights: Mapping[str, Any] = {}
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") or weights
        symmetric = weights.get("symmetric", True)
        return _grouped(weights.get("num_bits", 8), weights.get("group_size"), zero_points=not symmetric)
    if method == "bitsandbytes" or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return 4.13 if settings.get("load_in_4bit") else 8.0  # NF4 with nested scales of 64 weights each.
    return {"mxfp4": 4.25, "nvfp4": 4.5, "fp8": 8.0, "fbgemm_fp8": 8.0}.get(method)


def _grouped(bits: object, group: object, *, zero_points: bool) -> float | None:
    if not isinstance(bits, int):
        return None
    scales = 16 + (bits if zero_points else 0)
    return bits + (scales / group if isinstance(group, int) and group > 0 else 0.0)


def with_bits(layers: Iterable[Part], bits: float, *, experts_only: bool = False) -> list[Part]:
    """Returns the layers with weights that take `bits` each. `experts_only`: only those of routed experts do."""
    return [replace(layer, bits=None if experts_only else bits, expert_bits=bits) for layer in layers]
