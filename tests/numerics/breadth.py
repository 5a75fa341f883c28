"""Every decoder-only text architecture of the installed transformers that declares a pipeline plan, made tiny.

A config's sizes are set by what they are called; what a class derives from them (`layer_types`, ...) it derives. Each
is then split into three stages in one process and compared with transformers' own `generate`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from chain import Chain
from tiny_models import BOS, EOS, PAD, VOCAB_SIZE, ClearPrompt, clear_prompts, save_checkpoint
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stagemesh.errors import UnsupportedModel
from stagemesh.models.support import why_not
from stagemesh.stage_worker.model.choose import kernel_model
from stagemesh.stage_worker.model.plain.hf import causal_class, deciding, per_layer
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native.model import NotNative

NUM_LAYERS = 5
BOUNDS = (0, 2, 4, 5)
LENGTHS = (7, 300)
MAX_TOKENS = 6

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "sliding_window": 40,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "ffn_hidden_size": 96,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 16,
}
_UNUSUAL: dict[str, Any] = {
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "mup_enabled": True,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "clip_qkv": 2.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
    "logit_scale": 0.25,
    "final_logit_softcapping": 30.0,
}
"""What is off or one by default, so that a test of the defaults would not see it lost. For whoever has it."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OF_SOME: dict[str, dict[str, Any]] = {
    "cohere": {"tie_word_embeddings": False},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 32},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 32},
    "hrm_text": {},
    "longcat_flash": {"num_layers": NUM_LAYERS},
    "minimax_m3_vl_text": {"layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 3},
    "ministral": {"head_dim": 16},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "arcee": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "qwen2_moe": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
}
"""Settings beside the rules, by model type."""


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture."""

    model_type: str
    architecture: str
    status: str
    """works, refused or failed"""
    detail: str = ""
    by_class: bool = False
    """Whether it is refused whatever its configuration."""
    plain_because: str = ""
    """Why it does not run through compiled kernels; "" if it does."""


def model_types() -> Iterator[str]:
    """Every model type with a causal language model and a pipeline plan."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if getattr(CONFIG_MAPPING[model_type], "base_model_pp_plan", None):
            yield model_type


def tiny_config(model_type: str) -> Any:
    """A small config of this type; where it has towers beside the text model, those stay as they are."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    settings = {name: value for name, value in _SIZES.items() if any(per_layer(default, name))}
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        settings.pop("head_dim", None)
    computed = {name for name in _UNUSUAL if isinstance(getattr(config_class, name, None), property)}
    settings |= {name: value for name, value in _UNUSUAL.items() if hasattr(default, name) and name not in computed}
    settings |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return config_class(**(settings | _OF_SOME.get(model_type, {})))


def try_architecture(model_type: str, folder: str) -> Outcome:
    """Split, run, compare: through transformers' modules, and through compiled kernels if they can.

    Raises:
        AssertionError: some token differs, or forgetting the KV changes nothing.
    """
    config = tiny_config(model_type)
    model_class = causal_class(config)
    reason = why_not(deciding(config))
    if reason is not None:
        return Outcome(model_type, model_class.__name__, "refused", reason)
    save_checkpoint(model_class, config, folder)
    try:
        chain = Chain(folder, BOUNDS, num_pages=32, enforce_eager=True)
    except UnsupportedModel as error:
        return Outcome(model_type, model_class.__name__, "refused", error.message, by_class=True)
    prompts = clear_prompts(folder, LENGTHS, MAX_TOKENS)
    check(chain, prompts)
    try:
        kernel_model(ShardSpec(folder, 0, 1, "float32"))
    except NotNative as why:
        return Outcome(model_type, model_class.__name__, "works", plain_because=str(why))
    check(Chain(folder, BOUNDS, num_pages=32), prompts)
    return Outcome(model_type, model_class.__name__, "works")


def check(chain: Chain, prompts: list[ClearPrompt]) -> None:
    """The chain's tokens are the whole model's, and come from its KV."""
    expected = [prompt.tokens for prompt in prompts]
    got = chain.greedy([prompt.prompt_ids for prompt in prompts], MAX_TOKENS)
    assert got == expected, f"split {got}, whole {expected}, margins {[prompt.margin for prompt in prompts]}"
    forgot = chain.greedy([prompt.prompt_ids for prompt in prompts], MAX_TOKENS, forget=True)
    assert all(some != right for some, right in zip(forgot, expected, strict=True)), "KV zeroed, tokens the same"


if __name__ == "__main__":
    import sys
    import time
    import traceback

    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or model_types():
        begun = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as scratch:
                print(try_architecture(wanted, scratch), f"{time.monotonic() - begun:.1f} s", flush=True)
        except Exception as error:  # noqa: BLE001
            frames = traceback.extract_tb(error.__traceback__)
            print(
                "FAILED",
                wanted,
                repr(error)[:300],
                [f"{f.filename.rsplit('/')[-1]}:{f.lineno}" for f in frames[-4:]],
                flush=True,
            )
