"""Sizes of models from their configuration alone: beside what is published, and beside transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, make_checkpoint

from stagemesh.checkpoint import describe, inspect
from stagemesh.errors import UnsupportedModel
from stagemesh.models.size import CheckpointInfo, ModelConfig, estimated

LLAMA_70B = {
    "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
MIXTRAL = {
    **LLAMA_70B, "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
GPT_OSS = {
    **LLAMA_70B, "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "intermediate_size": 2880,
    "head_dim": 64, "vocab_size": 201088, "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128,
}  # fmt: skip
QWEN3_MOE = {
    **LLAMA_70B, "model_type": "qwen3_moe", "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
DEEPSEEK_V3 = {
    **LLAMA_70B, "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
    "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


def size(config: dict[str, Any]) -> CheckpointInfo:
    numbers = ModelConfig(config, Path("config.json"))
    return numbers.info(estimated(numbers), "bfloat16", tied=numbers.tied)


def active(info: CheckpointInfo) -> float:
    """Parameters that are multiplied for one token."""
    return sum(part.flops_per_token for part in (*info.layers, info.head)) / 2


@pytest.mark.parametrize(
    ("config", "billions", "active_billions"),
    [
        (LLAMA_70B, 70.6, 69.5),
        (MIXTRAL, 46.7, 12.7),
        (GPT_OSS, 116.8, 5.1),
        (QWEN3_MOE, 235.1, 21.5),
        (DEEPSEEK_V3, 671.0, 36.6),
    ],
)
def test_the_published_numbers_of_parameters(config: dict[str, Any], billions: float, active_billions: float) -> None:
    info = size(config)
    assert info.total_parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert active(info) / 1e9 == pytest.approx(active_billions, rel=0.01)  # the embedding is not multiplied


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_modules_have_as_many(family: str) -> None:
    name, settings = FAMILIES[family]
    kv_heads = 4 if family in ("deepseek_v3", "gpt_neox") else 2
    common = {
        "pad_token_id": 0,
        "vocab_size": 260,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    # Wide heads: biases and norms are then as small beside the matrices as in a real model.
    wide = {} if family == "deepseek_v3" else {"head_dim": 64, "query_pre_attn_scalar": 64}
    config = getattr(transformers, f"{name}Config")(**{**common, **heads, **settings, **wide})
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    info = size(json.loads(config.to_json_string()))
    assert info.total_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_experts_are_those_that_a_step_may_leave_out() -> None:
    layer = size(MIXTRAL).layers[0]
    assert layer.expert_parameters == 8 * 3 * 4096 * 14336
    dense, sparse = size(DEEPSEEK_V3).layers[2:4]
    assert dense.expert_parameters == 0
    assert sparse.expert_parameters == 256 * 3 * 7168 * 2048
    every_second = size({**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [part.expert_parameters > 0 for part in every_second.layers[:6]] == [False, True, False, False, False, True]


def test_latent_attention_keeps_heads_on_every_rank() -> None:
    """What pages hold today. With the latent alone it would be 576."""
    info = size(DEEPSEEK_V3)
    assert info.kv_elements_per_token == 128 * (128 + 64 + 128)
    assert info.kv_on_every_rank
    assert not size(LLAMA_70B).kv_on_every_rank


class TestBits:
    """Bytes of quantized weights, from the configuration where the weights are not there."""

    @pytest.mark.parametrize(
        ("method", "bits"),
        [
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8.0),
            ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.0 + 20 / 128),
            ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8.0),
            ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4.0 + 20 / 64),
            ({"quant_method": "mxfp4"}, 4.25),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.13),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128, "symmetric": True}}},
                },
                4.125,
            ),
        ],
    )
    def test_by_method(self, tmp_path: Path, method: dict[str, Any], bits: float) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "quantization_config": method}))
        layer = describe(tmp_path).layers[0]
        assert (layer.bits, layer.expert_bits) == (bits, bits)
        assert layer.expert_bytes(2) == pytest.approx(8 * 3 * 4096 * 14336 * bits / 8)

    def test_of_experts_alone(self, tmp_path: Path) -> None:
        method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
        (tmp_path / "config.json").write_text(json.dumps({**GPT_OSS, "quantization_config": method}))
        layer = describe(tmp_path).layers[0]
        assert (layer.bits, layer.expert_bits) == (None, 4.25)

    def test_of_a_method_that_is_not_known(self, tmp_path: Path) -> None:
        config = {**LLAMA_70B, "quantization_config": {"quant_method": "aqlm"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModel, match=r"how many bits.*aqlm.*fetch the weights"):
            describe(tmp_path)


def test_headers_go_before_the_formula(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    assert describe(folder) == inspect(folder)
    (folder / "model.safetensors").unlink()
    assert describe(folder).layers[0].parameters == pytest.approx(inspect(folder, "dummy").layers[0].parameters)
