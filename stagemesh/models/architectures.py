"""What transformers 5.23.0 says of each model type, for services that do not import it.

Written by tools/make_models_doc.py, not by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MADE_WITH = "5.23.0"


@dataclass(frozen=True)
class Architecture:
    """A model type that declares a pipeline plan."""

    verified: bool = False
    """Whether its split gave transformers' own tokens."""
    cuts: Literal["", "heads", "kv_heads"] = ""
    """The heads that tensor-parallel ranks divide: none, query heads, or query and KV heads."""
    refusal: str = ""
    """Why it is refused whatever its configuration."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The class's defaults for which a model is refused, if config.json does not give other values."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "afmoe": Architecture(verified=True),
    "apertus": Architecture(verified=True, cuts="kv_heads"),
    "arcee": Architecture(verified=True, cuts="kv_heads"),
    "aria_text": Architecture(verified=True, cuts="kv_heads"),
    "axk1": Architecture(verified=True),
    "axk2": Architecture(cuts="heads", defaults={"layer_types": ["indexed_attention"]}),
    "bailing_hybrid": Architecture(defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "beam": Architecture(verified=True, cuts="kv_heads"),
    "cohere": Architecture(verified=True, cuts="kv_heads"),
    "cohere2": Architecture(verified=True, cuts="kv_heads"),
    "cohere2_moe": Architecture(verified=True, cuts="kv_heads"),
    "cohere_compass_text": Architecture(verified=True, cuts="kv_heads"),
    "cwm": Architecture(verified=True, cuts="kv_heads"),
    "deepseek_v2": Architecture(verified=True, cuts="heads"),
    "deepseek_v3": Architecture(verified=True),
    "deepseek_v32": Architecture(cuts="heads", defaults={"layer_types": ["indexed_attention"]}),
    "deepseek_v4": Architecture(
        defaults={"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"]}
    ),
    "doge": Architecture(
        cuts="kv_heads", refusal="DogeAttention makes an attention mask of its own, for dense keys only"
    ),
    "dots1": Architecture(verified=True, cuts="kv_heads"),
    "dots3_note_text": Architecture(cuts="heads", defaults={"layer_types": ["indexed_attention", "sliding_attention"]}),
    "ernie4_5": Architecture(verified=True, cuts="kv_heads"),
    "ernie4_5_moe": Architecture(verified=True, cuts="kv_heads"),
    "exaone4": Architecture(verified=True, cuts="kv_heads"),
    "exaone_moe": Architecture(verified=True, cuts="kv_heads"),
    "flex_olmo": Architecture(verified=True),
    "flint": Architecture(verified=True),
    "gemma": Architecture(verified=True, cuts="kv_heads"),
    "gemma2": Architecture(verified=True, cuts="kv_heads"),
    "gemma3_text": Architecture(verified=True, cuts="kv_heads"),
    "gemma3n_text": Architecture(
        cuts="kv_heads", defaults={"num_kv_shared_layers": 15, "hidden_size_per_layer_input": 256}
    ),
    "gemma4_text": Architecture(verified=True, cuts="kv_heads", defaults={"hidden_size_per_layer_input": 256}),
    "gemma4_unified_text": Architecture(verified=True, cuts="kv_heads"),
    "glm": Architecture(verified=True, cuts="kv_heads"),
    "glm4": Architecture(verified=True, cuts="kv_heads"),
    "glm4_moe": Architecture(verified=True, cuts="kv_heads"),
    "glm4_moe_lite": Architecture(verified=True, cuts="heads"),
    "glm_moe_dsa": Architecture(cuts="heads", defaults={"layer_types": ["indexed_attention"]}),
    "gpt_neox": Architecture(verified=True, cuts="heads"),
    "gpt_oss": Architecture(verified=True),
    "granite": Architecture(verified=True, cuts="kv_heads"),
    "granite_swa": Architecture(verified=True, cuts="kv_heads"),
    "helium": Architecture(verified=True, cuts="kv_heads"),
    "hrm_text": Architecture(
        cuts="kv_heads",
        refusal="HrmTextForCausalLM does not hold its layers in one list of as many modules: it cannot be split",
    ),
    "hy_v3": Architecture(verified=True, cuts="kv_heads"),
    "hy_v4": Architecture(cuts="heads", defaults={"layer_types": ["indexed_attention"]}),
    "hyperclovax": Architecture(verified=True, cuts="kv_heads"),
    "inkling_text": Architecture(defaults={"layer_types": ["hybrid", "hybrid_sliding"]}),
    "internlm3": Architecture(verified=True, cuts="kv_heads"),
    "iquestcoder": Architecture(verified=True, cuts="kv_heads"),
    "jais2": Architecture(verified=True, cuts="kv_heads"),
    "kimi_linear": Architecture(defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "kolibri1": Architecture(verified=True, cuts="kv_heads"),
    "laguna": Architecture(verified=True, cuts="kv_heads"),
    "llama": Architecture(verified=True, cuts="kv_heads"),
    "longcat_flash": Architecture(
        cuts="heads",
        refusal="LongcatFlashForCausalLM does not hold its layers in one list of as many modules: it cannot be split",
    ),
    "mellum": Architecture(verified=True, cuts="kv_heads"),
    "mimo_v2_flash": Architecture(verified=True, cuts="kv_heads"),
    "minicpm3": Architecture(verified=True, cuts="heads"),
    "minimax": Architecture(cuts="kv_heads", defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "minimax_m2": Architecture(verified=True),
    "minimax_m3_vl_text": Architecture(),
    "ministral": Architecture(verified=True, cuts="kv_heads"),
    "ministral3": Architecture(verified=True, cuts="kv_heads"),
    "mistral": Architecture(verified=True, cuts="kv_heads"),
    "mixtral": Architecture(verified=True, cuts="kv_heads"),
    "olmo": Architecture(verified=True, cuts="kv_heads"),
    "olmo2": Architecture(verified=True),
    "olmo3": Architecture(verified=True),
    "olmo_hybrid": Architecture(defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "phi": Architecture(verified=True, cuts="kv_heads"),
    "phi3": Architecture(verified=True),
    "phi4_multimodal": Architecture(defaults={"vision_config": {}, "audio_config": {}}),
    "qwen2": Architecture(verified=True, cuts="kv_heads"),
    "qwen2_moe": Architecture(verified=True, cuts="kv_heads"),
    "qwen3": Architecture(verified=True, cuts="kv_heads"),
    "qwen3_5_moe_text": Architecture(cuts="kv_heads", defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "qwen3_5_text": Architecture(cuts="kv_heads", defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "qwen3_moe": Architecture(verified=True, cuts="kv_heads"),
    "qwen3_next": Architecture(cuts="kv_heads", defaults={"layer_types": ["full_attention", "linear_attention"]}),
    "seed_oss": Architecture(verified=True, cuts="kv_heads"),
    "smollm3": Architecture(verified=True, cuts="kv_heads"),
    "solar_open": Architecture(verified=True, cuts="kv_heads"),
    "starcoder2": Architecture(verified=True, cuts="kv_heads"),
    "vaultgemma": Architecture(verified=True, cuts="kv_heads"),
    "youtu": Architecture(verified=True),
}
