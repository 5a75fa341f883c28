"""Tells whether the weights of a checkpoint are quantized, and by which method: from its configuration, and from the
names and types of its tensors. Pure.

This is the one place that decides it. Nothing quantized is served yet, so whoever reads a checkpoint calls
`refuse_quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import UnsupportedModel
from stagemesh.safetensors_header import StoredTensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NEVER_WEIGHTS = frozenset({"BOOL", "I64", "U64"})
"""Types of masks, indices and shapes. No method stores weights as these."""
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""transformers' key; that of earlier compressed-tensors; that of MLX, and of ModelOpt in hf_quant_config.json."""

_MARKS = (
    (r"\.weight_scale_inv", "FP8 by blocks"),
    (r"\.weight_scale_2", "NVFP4"),
    (r"\.weight_(?:packed|global_scale|shape)", "compressed-tensors"),
    (r"_proj_(?:blocks|scales)", "MXFP4"),
    (r"\.(?:weight_)?g_idx", "GPTQ"),
    (r"\.q(?:weight|zeros)", "GPTQ or AWQ"),
    (r"\.(?:SCB|weight_format)", "bitsandbytes INT8"),
    (r"\.(?:nested_)?(?:absmax|quant_map)|\.quant_state\..+", "bitsandbytes with 4 bits"),
    (r"\.(?:_weight_qdata|_weight_scale|_weight_zero_point)", "torchao"),
    (r"\.(?:codes|codebooks)", "AQLM"),
    (
        r"\.(?:weight_scales?|weight_zero_point|(?:in|out)put_scale|(?:in|out)put_zero_point|activation_scale|scales|zeros)",
        "weights with scales",
    ),
    (r"\.[qkv]_(?:scale|zero_point)|\.kv_cache_scale", "a quantized KV cache"),
)
"""Ends of names of the tensors that each method stores beside its weights, the most telling first."""
_MARK = re.compile("|".join(f"({pattern})$" for pattern, _ in _MARKS))
_TYPES = {"I8": "INT8", "F8_E4M3": "FP8", "F8_E5M2": "FP8"}


@dataclass(frozen=True)
class Quantized:
    """That and how weights are quantized."""

    method: str
    """The method, as the configuration names it, or as the tensors look."""
    sign: str
    """Where that shows: a key of a file, or a tensor."""


def quantized(
    configs: Mapping[str, Mapping[str, Any]], tensors: Iterable[tuple[str, StoredTensor | None]] = ()
) -> Quantized | None:
    """Returns how the weights are quantized, or None if they are not.

    Args:
        configs: the files that may say it, by name (`read_configs`).
        tensors: names of tensors, with their types where they are known.
    """
    for file, content in configs.items():
        if (found := _of_config(file, content)) is not None:
            return found
    first, sign = len(_MARKS), ""
    of_type: tuple[str, str] | None = None
    for name, tensor in tensors:
        if (mark := _MARK.search(name)) and (mark.lastindex or 0) - 1 < first:
            first, sign = (mark.lastindex or 0) - 1, name
        if of_type is None and tensor is not None and _is_quantized_type(tensor):
            of_type = name, tensor.dtype
    if sign:
        return Quantized(_MARKS[first][1], f"tensor {sign!r}")
    if of_type is not None:
        name, dtype = of_type
        return Quantized(_TYPES.get(dtype, "packed numbers"), f"tensor {name!r} of type {dtype}")
    return None


def _of_config(file: str, content: Mapping[str, Any]) -> Quantized | None:
    nested = content.get("text_config")
    for part in (content, nested if isinstance(nested, dict) else {}):
        for key in _CONFIG_KEYS:
            if value := part.get(key):
                value = value if isinstance(value, dict) else {}
                method = value.get("quant_method") or value.get("quant_algo")
                if method is None and "quant_algo" in value:
                    continue  # ModelOpt quantized the KV cache alone.
                if method is None and (value.get("load_in_4bit") or value.get("load_in_8bit")):
                    method = "bitsandbytes"
                return Quantized(str(method or "a method without a name"), f"{key} in {file}")
    return None


def _is_quantized_type(tensor: StoredTensor) -> bool:
    """Whether only quantized weights have this type. A vector of integers may be something else, such as indices."""
    if tensor.dtype in FLOATS or tensor.dtype in _NEVER_WEIGHTS:
        return False
    return tensor.dtype.startswith("F") or len(tensor.shape) > 1


def refuse_quantized(
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
    tensors: Iterable[tuple[str, StoredTensor | None]] = (),
) -> None:
    """Raises UnsupportedModel if the weights are quantized. It names the tensor and the method. See `quantized`."""
    found = quantized(configs, tensors)
    if found is not None:
        raise UnsupportedModel(
            f"{folder}: its weights are quantized ({found.method}: {found.sign}), which cannot be served yet; use the "
            "checkpoint in bfloat16, float16 or float32"
        )
