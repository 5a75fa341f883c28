"""Reads from a checkpoint's configuration how its weights are quantized. Pure.

What is not known is refused by name: a method, or a setting of a method from which other weights would follow. Settings
of activations are not read: weights are used as weights only, whatever their authors did to activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stagemesh.errors import UnsupportedModel

Format = Literal["scaled", "pack-quantized", "gptq", "awq", "mxfp4", "fp4", "bnb-4bit", "bnb-int8", "torchao"]
"""How one linear is stored. Most methods have one format, and some formats belong to several methods."""
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""transformers' key; that of earlier compressed-tensors; that of MLX, and of ModelOpt in hf_quant_config.json."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized."""

    method: str
    """The method, as the configuration names it."""
    sign: str
    """Where it says so."""
    formats: frozenset[Format]
    """The formats that its linears may have."""
    bits: int = 8
    """Bits of a weight, unless `bits_of` says otherwise."""
    bits_of: tuple[tuple[str, int], ...] = ()
    """(module name, `re:` and a pattern, or class) -> bits of its weights, the first match counts."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, if scales are for blocks."""
    symmetric: bool = False
    """Whether the code of zero is the middle of all codes, whatever is stored."""
    zero_offset: int = 0
    """What is to be added to a stored zero point."""

    def bits_in(self, linear: str) -> int:
        """Returns the bits of a linear's weights. `linear` is the name of the module."""
        for target, bits in self.bits_of:
            pattern = target[3:] if target.startswith("re:") else rf"(.+\.)?{re.escape(target)}$"
            if target == "Linear" or re.match(pattern, linear):
                return bits
        return self.bits


class _Refused(Exception):
    """A setting that is not known, as text."""


def quantization_of(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> Quantization | None:
    """Returns how the weights are quantized, or None if the configuration does not say that they are.

    Args:
        folder: the checkpoint's, for errors.
        configs: the files that may say it, by name (`read_configs`).

    Raises:
        UnsupportedModel: the method, or one of its settings, is not known. The error names it.
    """
    for sign, settings in _found(configs):
        method = _method(settings)
        if method is None:
            continue  # ModelOpt quantized the KV cache alone.
        read = _METHODS.get(method)
        if read is None:
            raise refused(folder, f"{method}: {sign}", f"none of {', '.join(sorted(_METHODS))}")
        try:
            return read(method, sign, settings)
        except _Refused as e:
            raise refused(folder, f"{method}: {sign}", f"and {e} is not known") from e
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise refused(folder, f"{method}: {sign}", f"and its settings cannot be read: {e!r}") from e
    return None


def refused(folder: Path, what: str, why: str) -> UnsupportedModel:
    """Returns the error for quantized weights that cannot be served."""
    return UnsupportedModel(f"{folder}: its weights are quantized ({what}), {why}; use the checkpoint in bfloat16")


def _found(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file, content in configs.items():
        nested = content.get("text_config")
        for part in (content, nested if isinstance(nested, dict) else {}):
            for key in _CONFIG_KEYS:
                if value := part.get(key):
                    yield f"{key} in {file}", value if isinstance(value, dict) else {}


def _method(settings: Mapping[str, Any]) -> str | None:
    method = settings.get("quant_method")
    if method is None and "quant_algo" in settings:
        return "modelopt" if settings["quant_algo"] else None
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "a method without a name")


def _one_of(settings: Mapping[str, Any], key: str, *known: object, default: object = None) -> Any:
    """Returns a setting. Raises _Refused if it is none of the known values."""
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, str):
        value = value.lower()
    if value not in known:
        raise _Refused(f"{key} {value!r}")
    return value


def _nothing(settings: Mapping[str, Any], *keys: str) -> None:
    """Raises _Refused if one of these settings is given."""
    for key in keys:
        if settings.get(key):
            raise _Refused(f"{key} {settings[key]!r}")


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    rows, columns = map(int, value)
    return rows, columns


def _fp8(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    _one_of(settings, "fmt", "e4m3", "float8_e4m3fn", None)
    _one_of(settings, "expert_dtype", "fp8", None)
    return Quantization(method, sign, frozenset({"scaled"}), block=_pair(settings.get("weight_block_size")))


def _compressed_tensors(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    formats: dict[str | None, Format] = {
        "int-quantized": "scaled", "float-quantized": "scaled", "naive-quantized": "scaled",
        "pack-quantized": "pack-quantized", "nvfp4-pack-quantized": "fp4", "mxfp4-pack-quantized": "fp4",
    }  # fmt: skip
    _nothing(settings, "transform_config")
    _one_of(settings.get("sparsity_config") or {}, "format", "dense", default="dense")
    whole = _one_of(settings, "format", *formats, "mixed-precision")
    used, bits_of, block = set[Format](), list[tuple[str, int]](), None
    for group in settings["config_groups"].values():
        weights = group.get("weights")
        if weights is None:
            continue
        used.add(formats[_one_of(group, "format", *formats, default=whole)])
        kind, bits = _one_of(weights, "type", "int", "float", default="int"), int(weights.get("num_bits", 8))
        if bits not in (4, 8):
            raise _Refused(f"num_bits {bits}")
        strategies = ("tensor", "channel", "group", "block", "tensor_group", None)
        if _one_of(weights, "strategy", *strategies) == "block" and "block_structure" in weights:
            block = _pair(weights["block_structure"])
        if kind == "float" and bits == 4 and weights.get("group_size") not in (16, 32):
            raise _Refused(f"group_size {weights.get('group_size')} of float weights with 4 bits")
        bits_of += [(str(target), bits) for target in group.get("targets", ["Linear"])]
    if not bits_of:
        raise _Refused("a configuration without a group of weights")
    # Targets that name a module come before those that name a class.
    bits_of.sort(key=lambda entry: entry[0] == "Linear")
    return Quantization(method, sign, frozenset(used), bits_of[0][1], tuple(bits_of), block)


def _gptq(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    _one_of({"checkpoint_format": version}, "checkpoint_format", "gptq", "gptq_v2")
    _nothing(settings, "is_marlin_format", "adapter", "rotation")
    bits = _one_of(settings, "bits", 4, 8)
    return Quantization(
        method,
        sign,
        frozenset({"gptq"}),
        bits,
        symmetric=bool(settings.get("sym", True)),
        zero_offset=1 if str(version).lower() == "gptq" else 0,
    )


def _awq(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    version = settings.get("version") or settings.get("format") or "gemm"
    _one_of({"version": version}, "version", "gemm")
    bits = settings.get("bits", settings.get("w_bit"))
    return Quantization(method, sign, frozenset({"awq"}), _one_of({"bits": bits}, "bits", 4, default=4))


def _mxfp4(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    return Quantization(method, sign, frozenset({"mxfp4"}), 4)


def _modelopt(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    algorithm = _one_of(settings, "quant_algo", "fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "nvfp4")
    if algorithm == "nvfp4":
        return Quantization(f"{method} NVFP4", sign, frozenset({"fp4", "scaled"}), 4)
    block = (128, 128) if algorithm == "fp8_pb_wo" else None
    return Quantization(f"{method} FP8", sign, frozenset({"scaled"}), block=block)


def _bitsandbytes(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    if settings.get("load_in_4bit"):
        _one_of(settings, "bnb_4bit_quant_type", "nf4", default="fp4")
        _one_of(settings, "bnb_4bit_quant_storage", "uint8", "torch.uint8", default="uint8")
        return Quantization(f"{method} NF4", sign, frozenset({"bnb-4bit"}), 4)
    return Quantization(f"{method} INT8", sign, frozenset({"bnb-int8"}))


def _torchao(method: str, sign: str, settings: Mapping[str, Any]) -> Quantization:
    kinds = {
        "Int8WeightOnlyConfig": 8, "Int4WeightOnlyConfig": 4, "Float8WeightOnlyConfig": 8,
        "Int8DynamicActivationInt8WeightConfig": 8, "Float8DynamicActivationFloat8WeightConfig": 8,
        "IntxWeightOnlyConfig": 8, "Int8DynamicActivationIntxWeightConfig": 8,
    }  # fmt: skip
    kind = settings.get("quant_type")
    kind = kind.get("default", kind) if isinstance(kind, dict) else kind
    name = kind.get("_type") if isinstance(kind, dict) else kind
    if name not in kinds:
        raise _Refused(f"quant_type {name!r}")
    return Quantization(f"{method} {name}", sign, frozenset({"torchao"}), kinds[name])


_METHODS: Mapping[str, Callable[[str, str, Mapping[str, Any]], Quantization]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
