"""Decides from a model's configuration whether it can be served, and over how many tensor-parallel ranks. Pure.

The coordinator has config.json alone. What config.json leaves to the defaults of transformers' class, and what only the
class shows, comes from a table (architectures.py). A rank asks `why_not` again about the class's own values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stagemesh.errors import ConfigError, UnsupportedModel

from .architectures import ARCHITECTURES, MADE_WITH

PLUGINS = "STAGEMESH_PLUGINS"
"""Environment variable with names of modules, separated by commas. A rank imports them, so that they can register
shards for further model types (after vLLM's plugins). The coordinator only sees that it is set."""
DECIDING = (
    "layer_types",
    "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "vision_config",
    "audio_config",
    "use_bidirectional_attention",
    "rope_parameters",
    "rope_scaling",
)
"""The values of a configuration that `why_not` reads."""

_MIXERS = frozenset({"full_attention", "sliding_attention"})
"""Values of `layer_types` that use the attention function, with causal attention over pages."""
_ROPES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
_ROPES_OF_THE_LONGEST = frozenset({"longrope", "su", "dynamic"})
_SCALED_ROPES = frozenset({"linear", "dynamic", "yarn"})
"""Rotary embeddings whose `factor` multiplies the positions that the model was made for. `max_position_embeddings` of a
model with llama3 or longrope is the scaled length already."""


def check_supported(config: Mapping[str, Any], *, installed: str = "", plugins: bool = False) -> None:
    """Checks that a model can be split into stages and gives the right tokens.

    Args:
        config: the content of config.json.
        installed: the version of transformers on this machine. A newer one than the table's may know more model types.
        plugins: whether ranks import plugins, which may serve model types of their own.

    Raises:
        UnsupportedModel: it cannot be served. The error gives the reason.
    """
    model_type = str(config.get("model_type"))
    known = ARCHITECTURES.get(model_type)
    if known is None and plugins:
        return
    reason = why_not({**(known.defaults if known else {}), **{k: v for k, v in config.items() if v is not None}})
    if reason is None and known is not None:
        reason = known.refusal or None
    elif reason is None and not _version(installed) > _version(MADE_WITH):
        reason = f"transformers {MADE_WITH} declares no pipeline plan for it (docs/models.md lists what is served)"
    if reason is not None:
        raise refused(model_type, reason)


def refused(model_type: str, reason: str) -> UnsupportedModel:
    """Returns the error for a model that cannot be served."""
    return UnsupportedModel(f"model type {model_type!r} cannot be served: {reason}")


def why_not(values: Mapping[str, Any]) -> str | None:
    """Returns the reason why a model with these values of `DECIDING` is refused, or None if it is not."""
    kinds = values.get("layer_types")
    other = sorted({str(kind) for kind in kinds} - _MIXERS) if isinstance(kinds, list | tuple) else []
    if values.get("vision_config") is not None or values.get("audio_config") is not None:
        return "it has a vision or audio tower, and only text models are served"
    if other:
        return f"its layers mix tokens by {', '.join(other[:3])}, which is not attention over cached keys and values"
    if values.get("num_kv_shared_layers"):
        return "its layers share keys and values across a stage boundary"
    if values.get("hidden_size_per_layer_input"):
        return "every layer takes inputs beside the hidden states"
    if values.get("use_bidirectional_attention") in (True, "all"):
        return "its attention looks ahead"
    for rope in rope_groups(values):
        kind = str(rope_type(rope))
        if kind in _ROPES_OF_THE_LONGEST:
            return f"its rotary embedding ({kind}) depends on the longest position in a batch"
        if kind not in _ROPES:
            return f"its rotary embedding is of type {kind!r}, and {', '.join(sorted(_ROPES))} are served"
    return None


def rope_groups(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the settings of each rotary embedding: the model's, and those of each type of layer within them."""
    rope = values.get("rope_scaling") or values.get("rope_parameters")
    if isinstance(rope, dict):
        yield from [rope, *(group for group in rope.values() if isinstance(group, dict))]


def rope_type(rope: Mapping[str, Any]) -> object:
    """Returns the type of a rotary embedding. Its key was `type` before transformers 4.43."""
    return rope.get("rope_type", rope.get("type", "default"))


def longest_sequence(config: Mapping[str, Any], positions: int) -> int:
    """Returns the longest sequence that a model is made for.

    `positions` is its `max_position_embeddings`. With the rotary scaling of yarn, linear or dynamic, that is the length
    before scaling, and the factor multiplies it. Authors who state a longer length are believed. The rules are those of
    vLLM (`_get_and_verify_max_len`): Gemma 3 states the scaled length, and Cohere a `model_max_length`.
    """
    stated = config.get("model_max_length")
    longest = max(positions, stated) if isinstance(stated, int) else positions
    for rope in rope_groups(config) if not str(config.get("model_type")).startswith("gemma3") else ():
        factor, kind = rope.get("factor"), rope_type(rope)
        if kind not in _SCALED_ROPES or not isinstance(factor, int | float):
            continue
        # As in transformers, the value beside the rotary settings goes before the one in them.
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        before = original if kind == "yarn" and isinstance(original, int) else positions
        longest = max(longest, int(before * factor))
    return longest


def heads_to_divide(config: Mapping[str, Any]) -> frozenset[tuple[int, int]]:
    """Returns the numbers of heads (query heads, KV heads) that tensor-parallel ranks must divide.

    Empty if ranks hold all heads, or if config.json alone does not say (model types that are not in the table, or whose
    layers differ).
    """
    known = ARCHITECTURES.get(str(config.get("model_type")))
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if known is None or not known.cuts or not isinstance(heads, int) or not isinstance(kv_heads, int):
        return frozenset()
    if config.get("per_layer_config"):
        return frozenset()
    return frozenset({(heads, kv_heads if known.cuts == "kv_heads" else heads)})


def check_heads(counts: Collection[tuple[int, int]], size: int) -> None:
    """Checks that `size` tensor-parallel ranks cut no head in two. KV heads fewer than ranks are replicated.

    Args:
        counts: numbers of query heads and KV heads, as `heads_to_divide` returns them.
        size: number of ranks.

    Raises:
        ConfigError: they do. The error names the head counts, the size and the nearest size that works.
    """

    def fits(parts: int) -> bool:
        return all(
            heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0) for heads, kv_heads in counts
        )

    if fits(size):
        return
    nearest = min(filter(fits, range(1, max(heads for heads, _ in counts) + 1)), key=lambda parts: abs(parts - size))
    shown = " or ".join(f"{heads} attention heads and {kv_heads} KV heads" for heads, kv_heads in sorted(counts))
    raise ConfigError(
        f"tensor parallel size {size} does not divide the model's {shown}: the nearest size that works is {nearest}"
    )


def _version(text: str) -> tuple[int, ...]:
    """Returns (major, minor) of a version, or () if it is not one."""
    parts = text.split(".")[:2]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()
