"""Tells from names, types and shapes of tensors which of them make up one quantized weight. Pure.

A weight keeps the name that it has in a checkpoint without quantization: `model.layers.0.mlp.up_proj.weight`, or
`model.layers.0.mlp.experts.up_proj` for a stack of experts. `parts` are what is stored for it: part -> tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from stagemesh.errors import CheckpointError
from stagemesh.safetensors_header import StoredTensor

from .quantization import Format, Quantization, refused

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NEVER_WEIGHTS = frozenset({"BOOL", "I64", "U64"})
"""Types of masks, indices and shapes. No method stores weights as these."""

_PARTS = (
    (r"(.+_proj)_(blocks|scales)", ""),
    (r"(.+_proj)_(scale_inv)", ""),
    (r"(.+)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)", ".weight"),
    (
        r"(.+)\.(weight_scale_inv|weight_scale_2|weight_scale|weight_packed|weight_global_scale|weight_shape"
        r"|weight_zero_point|weight_g_idx|input_scale_ub|(?:in|out)put_scale|input_global_scale|input_zero_point"
        r"|activation_scale|qweight|qzeros|scales|g_idx|SCB|weight_format)",
        ".weight",
    ),
    (r"(.+)\._weight_(qdata|scale|zero_point|scale_and_zero|act_pre_scale|per_tensor_scale)", ".weight"),
)
"""Patterns of names: the module and the part; and what makes the module's name that of its weight."""
_PART = [(re.compile(pattern), end) for pattern, end in _PARTS]
_FORMATS: tuple[tuple[str, Format], ...] = (
    ("blocks", "mxfp4"),
    ("qdata", "torchao"),
    ("absmax", "bnb-4bit"),
    ("SCB", "bnb-int8"),
    ("weight_scale_2", "fp4"),
    ("weight_global_scale", "fp4"),
    ("weight_packed", "pack-quantized"),
    ("weight_scale_inv", "scaled"),
    ("scale_inv", "scaled"),
    ("weight_scale", "scaled"),
)
"""The part that shows a format, the most telling first. `qweight` is GPTQ's and AWQ's."""
_ONLY_ACTIVATIONS = r"\.(?:[qkv]_(?:scale|zero_point)|kv_cache_scale|(?:in|out)put_scale|(?:in|out)put_zero_point)$"
IGNORED = _ONLY_ACTIVATIONS + r"|\.(?:input_scale_ub|input_global_scale|activation_scale|kv_scale|prob_output_scale)$"
"""Pattern of tensors of a quantized checkpoint that weights do without: scales of activations and of a KV cache."""

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


def quantized_weights(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Returns weight -> part -> tensor, for each weight that is stored quantized. A part "weight" is the codes."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        if name.endswith((".weight", ".bias")):
            continue
        for pattern, end in _PART:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1] + end, {})[match[2].partition(".")[0]] = name
                break
    known = frozenset(names)
    for weight, parts in found.items():
        if weight in known:
            parts["weight"] = weight
    whole = {"weight", "weight_packed", "qweight", "blocks", "qdata"}
    scales = {part for part, _ in _FORMATS} | {"qweight"}
    return {weight: parts for weight, parts in found.items() if parts.keys() & whole and parts.keys() & scales}


def format_of(quantization: Quantization, parts: Mapping[str, str]) -> Format:
    """Returns the format of one weight. Raises CheckpointError if its tensors are not of the method's formats."""
    if "qweight" in parts:
        found: Format = "awq" if "awq" in quantization.formats else "gptq"
    else:
        found = next(kind for part, kind in _FORMATS if part in parts)
    if found == "pack-quantized" and found not in quantization.formats and "fp4" in quantization.formats:
        found = "fp4"  # MXFP4 has no global scale.
    if found not in quantization.formats:
        raise CheckpointError(
            f"tensor {next(iter(parts.values()))!r} is not stored as {quantization.method} stores weights, which "
            f"{quantization.sign} names: check that config.json belongs to these weights"
        )
    return found


def shape_of(quantization: Quantization, weight: str, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """Returns the shape of one weight from the headers of its parts: [n, k], or [experts, n, k].

    bitsandbytes' headers only give the number of elements with 4 bits: [1, elements].
    """
    if "blocks" in parts:
        experts, rows, groups, size = parts["blocks"].shape
        return experts, rows, groups * size * 2
    if "qweight" in parts:
        stored, columns = parts["qweight"].shape, parts["scales"].shape[1]
        if "awq" in quantization.formats:
            return columns, stored[0]
        return columns, stored[0] * columns // max(1, parts["qzeros"].shape[1])
    codes = next(parts[part] for part in ("weight_packed", "qdata", "weight") if part in parts)
    if codes.dtype == "U8" and "absmax" in parts:
        return 1, 2 * codes.parameters
    if codes.dtype == "U8":
        return *codes.shape[:-1], 2 * codes.shape[-1]
    if codes.dtype == "I32":
        return *codes.shape[:-1], codes.shape[-1] * 32 // quantization.bits_in(weight.removesuffix(".weight"))
    return codes.shape


def as_weights(quantization: Quantization | None, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the weights of a checkpoint: quantized ones with their shape and the bytes of all their parts.

    Scales of activations are left out.
    """
    if quantization is None:
        return dict(tensors)
    weights = dict(tensors)
    for weight, names in quantized_weights(tensors.keys()).items():
        format_of(quantization, names)
        parts = {part: weights.pop(name) for part, name in names.items()}
        shape = shape_of(quantization, weight, parts)
        weights[weight] = StoredTensor("packed", shape, 0, sum(part.nbytes for part in parts.values()))
    return {name: tensor for name, tensor in weights.items() if not re.search(IGNORED, name)}


def refuse_unnamed(folder: Path, tensors: Iterable[tuple[str, StoredTensor | None]]) -> None:
    """Refuses tensors of quantized weights that no configuration explains.

    Raises:
        UnsupportedModel: there is one. The error names it, and the method of which it looks.

    Args:
        folder: the checkpoint's, for errors.
        tensors: names of tensors, with their types where they are known.
    """
    first, sign = len(_MARKS), ""
    of_type: tuple[str, str] | None = None
    for name, tensor in tensors:
        if (mark := _MARK.search(name)) and (mark.lastindex or 0) - 1 < first:
            first, sign = (mark.lastindex or 0) - 1, name
        if of_type is None and tensor is not None and _is_quantized_type(tensor):
            of_type = name, tensor.dtype
    why = "and config.json and the files do not say how to read them"
    if sign:
        raise refused(folder, f"{_MARKS[first][1]}: tensor {sign!r}", why)
    if of_type is not None:
        name, dtype = of_type
        raise refused(folder, f"{_TYPES.get(dtype, 'packed numbers')}: tensor {name!r} of type {dtype}", why)


def _is_quantized_type(tensor: StoredTensor) -> bool:
    """Whether only quantized weights have this type. A vector of integers may be something else, such as indices."""
    if tensor.dtype in FLOATS or tensor.dtype in _NEVER_WEIGHTS or tensor.dtype == "packed":
        return False
    return tensor.dtype.startswith("F") or len(tensor.shape) > 1
