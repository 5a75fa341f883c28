"""Weights that are quantized while they load: how far they are from what they were, and what is left alone."""

from __future__ import annotations

import pytest
import torch

from stagemesh.errors import UnsupportedModel
from stagemesh.stage_worker.model.quantized.quantize import Method, is_quantizable, quantize, round_trip


def weight(n: int = 40, k: int = 384, seed: int = 1) -> torch.Tensor:
    """Normal numbers with an outlier in each row."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[:, 5] *= 8
    return w


def test_int8_is_within_half_a_step_of_a_row() -> None:
    w = weight()
    packed = quantize(w, "int8")
    assert (packed.kind, packed.group, packed.zeros) == ("int8", 384, None)
    assert ((packed.dequantize() - w).abs() <= 0.5001 * w.abs().amax(1, keepdim=True) / 127).all()


def test_fp8_is_within_a_sixteenth_of_each_number() -> None:
    w = weight()
    packed = quantize(w, "fp8")
    assert (packed.kind, packed.group) == ("fp8", 384)
    smallest = w.abs().amax(1, keepdim=True) / 448 * 2**-10
    assert ((packed.dequantize() - w).abs() <= w.abs() / 16 + smallest).all()


def test_int4_is_better_than_rounding_over_the_range_of_a_group() -> None:
    w = weight()
    packed = quantize(w, "int4")
    assert (packed.kind, packed.group) == ("int4", 128)
    assert isinstance(packed.zeros, torch.Tensor)
    groups = w.view(40, 3, 128)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    rounded = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    error, simple = (packed.dequantize() - w).norm(), (rounded.view_as(w) - w).norm()
    assert error < 0.98 * simple


@pytest.mark.parametrize(("k", "group"), [(128, 128), (192, 64), (96, 32), (48, 16), (10, 10)])
def test_groups_divide_the_inputs(k: int, group: int) -> None:
    packed = quantize(weight(8, k), "int4")
    assert packed.group == group
    assert packed.scales.shape == (8, k // group)
    assert packed.codes.shape == (8, k // 2)


def test_an_odd_number_of_inputs_has_no_int4() -> None:
    with pytest.raises(UnsupportedModel, match="97 inputs"):
        quantize(torch.ones(4, 97), "int4")


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_does_not_depend_on_others(method: Method, dtype: torch.dtype) -> None:
    w = weight(3000, 512).to(dtype)
    whole = quantize(w, method).dequantize(dtype)
    assert torch.equal(quantize(w[2040:2060], method).dequantize(dtype), whole[2040:2060])
    changed = w.clone()
    round_trip(changed, method)
    assert torch.equal(changed, whole)


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_zeros_stay_zero(method: Method) -> None:
    w = weight()
    w[3], w[:, 128:256] = 0, 0
    found = quantize(w, method).dequantize()
    assert found[w == 0].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (8, 8), True),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (8, 8), True),
        ("model.layers.3.mlp.experts.gate_up_proj", (4, 8, 8), True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", (8, 8), True),
        ("model.layers.3.self_attn.q_proj.bias", (8,), False),
        ("model.layers.3.mlp.experts.gate_up_proj_bias", (4, 8), False),
        ("model.layers.3.mlp.gate.weight", (4, 8), False),
        ("model.layers.3.mlp.router.weight", (4, 8), False),
        ("model.layers.3.mlp.shared_expert_gate.weight", (1, 8), False),
        ("model.layers.3.input_layernorm.weight", (8,), False),
        ("model.embed_tokens.weight", (8, 8), False),
        ("lm_head.weight", (8, 8), False),
    ],
)
def test_what_is_quantized(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    assert is_quantizable(name, shape) == wanted
