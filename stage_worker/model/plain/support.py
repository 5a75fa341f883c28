"""Decides from a config alone whether a model can be served, before any memory is allocated."""

from __future__ import annotations

from stagemesh.errors import UnsupportedModel

from .verified import VERIFIED

_MIXERS = frozenset({"full_attention", "sliding_attention"})
"""Values of `layer_types` that use the attention function, with causal attention over pages."""

_ROPE_OF_THE_LONGEST = frozenset({"longrope", "dynamic"})


def check_supported(config: object) -> None:
    """Checks that a model can be split and gives the right tokens.

    Raises:
        UnsupportedModel: it cannot be served. The error gives the reason.
    """
    reason = why_not(config)
    if reason is not None:
        raise UnsupportedModel(
            f"model type {getattr(config, 'model_type', '?')!r} cannot be served: {reason}. "
            f"These can (docs/models.md): {', '.join(VERIFIED)}"
        )


def why_not(config: object) -> str | None:
    """Returns the reason why this config is refused, or None if it is not."""
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized, and there are no kernels for that yet"
    if not getattr(config, "base_model_pp_plan", None):
        return "its architecture declares no base_model_pp_plan"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _MIXERS)
    if other:
        return f"its layers mix tokens by {', '.join(other)}, which is not attention over cached keys and values"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values across a stage boundary"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "every layer takes inputs beside the hidden states"
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        return "it has a vision or audio tower, and only text models are served"
    if getattr(config, "use_bidirectional_attention", None) in {True, "all"}:
        return "its attention looks ahead"
    rope = rope_types(config) & _ROPE_OF_THE_LONGEST
    if rope:
        return f"its rotary embedding ({', '.join(sorted(rope))}) depends on the longest position in a batch"
    return None


def rope_types(config: object) -> set[str]:
    """Returns the kinds of rotary embedding in a config, for all layer types."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return set()
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(group["rope_type"]) for group in groups if "rope_type" in group}
