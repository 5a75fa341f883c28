"""Sizes of models from their configuration alone: beside what is published, and beside transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_configs import DEEPSEEK_V3, GPT_OSS, LLAMA_70B, MIXTRAL, QWEN3_MOE
from tiny_models import FAMILIES, make_checkpoint

from stagemesh.checkpoint import describe, inspect
from stagemesh.errors import UnsupportedModel
from stagemesh.models.size import CheckpointInfo, ModelConfig, estimated


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
            ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4.13),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0),
            (
                {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
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
        with pytest.raises(UnsupportedModel, match=r"aqlm.*none of awq, .*torchao"):
            describe(tmp_path)


def test_headers_go_before_the_formula(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    assert describe(folder) == inspect(folder)
    (folder / "model.safetensors").unlink()
    assert describe(folder).layers[0].parameters == pytest.approx(inspect(folder, "dummy").layers[0].parameters)
