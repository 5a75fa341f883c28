"""Models of about 100 million weights that a token uses, of several kinds, as configs without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HIDDEN, WIDTH = 12, 768, 2048
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": WIDTH,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Kind:
    """One model. `experts` of which a token uses `used`; 0 for a dense model."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    experts: int = 0
    used: int = 0


def _mixture(model_type: str, experts: int, used: int, **settings: Any) -> Kind:
    width = WIDTH // used
    sizes = {"intermediate_size": width, "moe_intermediate_size": width, "num_experts_per_tok": used}
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    return Kind(model_type, {**sizes, **counts, **settings}, experts, used)


KINDS = {
    "llama": Kind("llama"),
    "gemma2": Kind("gemma2", {"query_pre_attn_scalar": 64}),
    "gpt_neox": Kind("gpt_neox", {"intermediate_size": 2560, "rotary_pct": 0.25, "num_key_value_heads": 12}),
    "phi3": Kind("phi3"),
    "olmo2": Kind("olmo2"),
    "granite": Kind("granite"),
    "mixtral 8x2": _mixture("mixtral", 8, 2),
    "qwen3_moe 8x2": _mixture("qwen3_moe", 8, 2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "gpt_oss 32x4": _mixture("gpt_oss", 32, 4),
    "deepseek_v3 32x4": _mixture(
        "deepseek_v3",
        32,
        4,
        first_k_dense_replace=0,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_key_value_heads=12,
        moe_intermediate_size=416,
    ),
}


def write_config(name: str, folder: Path, **changes: Any) -> None:
    """Writes the config.json of one of `KINDS`, in bf16."""
    kind = KINDS[name]
    settings = {**COMMON, **kind.settings, **changes}
    if kind.model_type == "deepseek_v3":
        settings.pop("head_dim")
    CONFIG_MAPPING[kind.model_type](**settings, dtype="bfloat16").save_pretrained(folder)
    # The tokenizer of the dense model ends a turn with these.
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": 0, "eos_token_id": [1, 3]}))
