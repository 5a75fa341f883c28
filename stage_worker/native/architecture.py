"""Decides from config.json alone whether the compiled kernels can run a model: pre-norm decoders with gated SiLU MLPs.

All values come from the file. If it leaves a value to a default of its class, the plain shard serves the model, because
that one uses the class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_BIASED_QKV = {"llama": "attention_bias", "mistral": None, "qwen2": True, "qwen3": "attention_bias"}
"""Model type -> whether queries, keys and values have a bias: always (True), never (None), or as this key says."""
_NORMED_HEADS = frozenset({"qwen3"})
_WINDOWED = frozenset({"mistral"})
"""Model types whose `sliding_window` alone applies to every layer."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NotNative(Exception):
    """The reason why the kernels cannot run a model."""


@dataclass(frozen=True)
class Architecture:
    """The properties of a model that the kernels need. Counts are the whole model's."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    head_norms: bool
    """Whether queries and keys are normalised head by head."""
    windows: tuple[int | None, ...]
    """Number of positions that a query sees in each layer; None for all."""
    inverse_frequencies: torch.Tensor
    """[D / 2] fp32: the angle per position of each pair."""
    dtype: torch.dtype | None
    """Dtype in the checkpoint's config, or None."""


def read_architecture(model_dir: str | Path) -> Architecture:
    """Reads the model in this folder. Raises NotNative with the reason why the plain shard must serve it."""
    try:
        raw: dict[str, Any] = json.loads((Path(model_dir) / "config.json").read_bytes())
        kind = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise NotNative(f"config.json cannot be read: {e!r}") from e
    if kind not in _BIASED_QKV:
        raise NotNative(f"model type {kind!r} is none of {', '.join(_BIASED_QKV)}")
    if raw.get("quantization_config") is not None:
        raise NotNative("its weights are quantized")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
        raise NotNative("its MLP is not silu(gate) * up without biases")
    try:
        return _read(kind, raw)
    except (KeyError, TypeError, ValueError) as e:
        raise NotNative(f"config.json leaves something open: {e!r}") from e


def _read(kind: str, raw: Mapping[str, Any]) -> Architecture:
    hidden, heads, layers = int(raw["hidden_size"]), int(raw["num_attention_heads"]), int(raw["num_hidden_layers"])
    head_dim = int(raw["head_dim"] if kind == "qwen3" else raw.get("head_dim") or hidden // heads)
    bias = _BIASED_QKV[kind]
    biased = bool(raw.get(bias)) if isinstance(bias, str) else bool(bias)
    named = raw.get("dtype", raw.get("torch_dtype"))
    return Architecture(
        num_layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(raw["num_key_value_heads"]),
        head_dim=head_dim,
        intermediate=int(raw["intermediate_size"]),
        vocab=int(raw["vocab_size"]),
        eps=float(raw["rms_norm_eps"]),
        tied=bool(raw["tie_word_embeddings"]),
        qkv_bias=biased,
        o_bias=biased and kind in ("llama", "qwen3"),
        head_norms=kind in _NORMED_HEADS,
        windows=_windows(kind, raw, layers),
        inverse_frequencies=_frequencies(raw, head_dim),
        dtype=DTYPES.get(str(named)),
    )


def _windows(kind: str, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    types = raw.get("layer_types")
    if window is None or raw.get("use_sliding_window") is False:
        return (None,) * layers
    if types is not None:
        if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
            raise NotNative(f"its layer types are {sorted(set(types))}")
        return tuple(int(window) if kind == "sliding_attention" else None for kind in types)
    if kind in _WINDOWED:
        return (int(window),) * layers
    raise NotNative("config.json has a sliding_window and does not say for which layers")


def _frequencies(raw: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Computes rotary frequencies of the plain, linearly scaled and Llama 3 embedding, as transformers does."""
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw["rope_theta"]}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise NotNative("only a part of each head is rotated")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (float(rope["rope_theta"]) ** exponents)
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / float(rope["factor"])
    if kind != "llama3":
        raise NotNative(f"its rotary embedding is of type {kind!r}")
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelengths > original / low, plain / factor, plain)
    medium = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(medium, between, scaled)


def dtype_of(wanted: str, a: Architecture) -> torch.dtype:
    """Returns the dtype of weights and KV: `wanted`, or the config's. Raises NotNative for one without kernels."""
    dtype = a.dtype if wanted == "auto" else DTYPES.get(wanted)
    if dtype is None:
        raise NotNative(f"dtype {wanted} has no kernels, or config.json names none that has")
    return dtype


def check_sizes(a: Architecture, page_size: int, tp_size: int) -> None:
    """Raises NotNative if the kernels do not support these sizes."""
    if page_size % 16 or a.hidden % 16 or a.head_dim % 16:
        raise NotNative(f"pages of {page_size}, {a.hidden} hidden and heads of {a.head_dim} are not multiples of 16")
    if a.heads % a.kv_heads or a.heads % tp_size or a.kv_heads % tp_size or a.intermediate % (2 * tp_size):
        raise NotNative(
            f"{a.heads}/{a.kv_heads} heads or {a.intermediate} MLP columns do not divide by {tp_size} ranks"
        )
