"""Weights that are quantized in an unknown way are refused by name, by the coordinator and by a rank.

And no other tensor of a checkpoint is left out silently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import tiny_config
from quantized_checkpoints import FORMATS, quantize_folder
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, save_checkpoint

from stagemesh.checkpoint import inspect
from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.models.quantized_tensors import refuse_unnamed
from stagemesh.stage_worker.messages.shared_memory import make_shared_memory
from stagemesh.stage_worker.model.choose import Shard, load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.plain.hf import causal_class
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native import ops

LINEAR = "model.layers.1.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "changed"))


@pytest.fixture(params=["kernels", "eager"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded for compiled kernels, and as on a machine that has none."""
    if request.param == "eager":
        monkeypatch.setattr(ops, "library", lambda: None)


def load(folder: Path, first: int, last: int) -> Shard:
    return load_shard(ShardSpec(str(folder), first, last, "float32"), TensorParallel())


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def stored(dtype: torch.dtype, **beside: torch.Tensor) -> Callable[[Tensors], object]:
    """The weight of a linear as another type, and what is stored beside it."""

    def change(tensors: Tensors) -> None:
        tensors[f"{LINEAR}.weight"] = (tensors[f"{LINEAR}.weight"] * 10).to(dtype)
        tensors.update({f"{LINEAR}.{name}": tensor for name, tensor in beside.items()})

    return change


def replaced(**by: torch.Tensor) -> Callable[[Tensors], object]:
    """Other tensors in the place of a linear's weight."""

    def change(tensors: Tensors) -> None:
        del tensors[f"{LINEAR}.weight"]
        tensors.update({f"{LINEAR}.{name}": tensor for name, tensor in by.items()})

    return change


def added(name: str, tensor: torch.Tensor | None = None) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(64) if tensor is None else tensor})


ONE, WORDS, BYTES = torch.ones(1), torch.ones(8, 64, dtype=torch.int32), torch.ones(64, 32, dtype=torch.uint8)
SCALES = torch.ones(64, 2)
UNNAMED: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "ModelOpt's FP8": (stored(torch.float8_e4m3fn, weight_scale=ONE, input_scale=ONE), "scales", "_scale"),
    "FP8 by blocks": (stored(torch.float8_e4m3fn, weight_scale_inv=ONE), "FP8 by blocks", "weight_scale_inv"),
    "FP8 alone": (stored(torch.float8_e5m2), "FP8", f"{LINEAR}.weight' of type F8_E5M2"),
    "INT8": (stored(torch.int8, weight_scale=SCALES), "scales", "weight_scale"),
    "INT8 alone": (stored(torch.int8), "INT8", f"{LINEAR}.weight' of type I8"),
    "bytes": (stored(torch.uint8), "packed", f"{LINEAR}.weight' of type U8"),
    "scales of floats": (added(f"{LINEAR}.weight_scale", ONE), "scales", "weight_scale"),
    "NVFP4": (stored(torch.uint8, weight_scale=SCALES, weight_scale_2=ONE), "NVFP4", "weight_scale_2"),
    "compressed-tensors": (replaced(weight_packed=WORDS, weight_scale=SCALES), "compressed-tensors", "weight_packed"),
    "GPTQ": (replaced(qweight=WORDS, qzeros=WORDS, scales=SCALES, g_idx=torch.ones(64, dtype=torch.int32)), "GPTQ", ""),
    "AWQ": (replaced(qweight=WORDS, qzeros=WORDS, scales=SCALES), "AWQ", "qweight"),
    "MXFP4": (added("model.layers.1.mlp.experts.gate_up_proj_blocks", BYTES), "MXFP4", "gate_up_proj_blocks"),
    "bitsandbytes INT8": (stored(torch.int8, SCB=ONE), "bitsandbytes INT8", "SCB"),
    "bitsandbytes NF4": (
        lambda tensors: tensors.update({f"{LINEAR}.weight": BYTES, f"{LINEAR}.weight.absmax": ONE}),
        "bitsandbytes with 4 bits",
        "absmax",
    ),
    "torchao": (replaced(_weight_qdata=BYTES, _weight_scale=ONE), "torchao", "_weight_"),
    "MLX": (stored(torch.int32, scales=SCALES, biases=SCALES), "scales", "scales"),
    "a quantized KV cache": (added("model.layers.1.self_attn.k_proj.k_scale", ONE), "KV cache", "k_scale"),
}


@pytest.mark.parametrize(("change", "method", "sign"), UNNAMED.values(), ids=list(UNNAMED))
def test_weights_that_look_quantized_are_refused_though_no_config_says_so(
    folder: Path, kernels: None, change: Callable[[Tensors], object], method: str, sign: str
) -> None:
    edit(folder, change)
    for look in (lambda: inspect(folder), lambda: load(folder, 0, 3)):
        with pytest.raises(UnsupportedModel) as caught:
            look()
        for word in (
            str(folder),
            "quantized",
            method,
            LINEAR.rsplit(".", 2)[0],
            sign,
            "use the checkpoint in bfloat16",
        ):
            assert word in caught.value.message, caught.value.message


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", {"quantization_config": {"quant_method": "aqlm"}}, "aqlm: quantization_config in config.json"),
        ("config.json", {"quantization_config": {"quant_method": "gguf"}}, "none of awq, bitsandbytes"),
        ("config.json", {"quantization_config": {"bits": 4}}, "a method without a name"),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "hqq"),
        ("config.json", {"compression_config": {"quant_method": "vptq"}}, "vptq: compression_config"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "quantization in config.json"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A8_AWQ"}}, "quant_algo 'w4a8_awq'"),
    ],
)
def test_a_method_that_is_not_known_is_named(
    folder: Path, kernels: None, file: str, content: dict[str, Any], says: str
) -> None:
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | content))
    for look in (lambda: load(folder, 0, 3), lambda: inspect(folder), lambda: inspect(folder, "dummy")):
        with pytest.raises(UnsupportedModel, match="quantized") as caught:
            look()
        assert says in caught.value.message


def group(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "settings cannot be read"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "bits 8"),
        ({"load_in_4bit": True}, "bnb_4bit_quant_type 'fp4'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}, "quant_storage"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "UIntXWeightOnlyConfig"}}}, "UIntX"),
        ({**group(num_bits=4), "format": "marlin-24"}, "format 'marlin-24'"),
        ({**group(num_bits=4), "sparsity_config": {"format": "sparse-bitmask"}}, "format 'sparse-bitmask'"),
        ({**group(num_bits=4), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        (group(num_bits=3), "num_bits 3"),
        (group(num_bits=4, type="float"), "group_size None of float weights"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "settings cannot be read"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_known_is_named(folder: Path, settings: dict[str, Any], says: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    for look in (lambda: load(folder, 0, 3), lambda: inspect(folder)):
        with pytest.raises(UnsupportedModel, match="quantized") as caught:
            look()
        assert says in caught.value.message


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        ("gptq", replaced(qweight=WORDS, scales=SCALES), "lacks some of its tensors"),
        ("fp8", stored(torch.float8_e4m3fn, weight_scale=torch.ones(3, 3)), r"scales of \[3, 3\]"),
        ("fp8", stored(torch.float8_e5m2, weight_scale=ONE), "F8_E5M2"),
        ("fp8", replaced(qweight=WORDS, qzeros=WORDS, scales=SCALES), "not stored as fp8 stores weights"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    folder: Path, config: str, change: Callable[[Tensors], object], says: str
) -> None:
    edit(folder, change)
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": config, "bits": 4}})
    )
    with pytest.raises(CheckpointError, match=says):
        load(folder, 0, 3)


def test_biases_that_autogptq_stored_for_linears_without_one_are_left_out_if_they_are_zero(
    llama: Path, tmp_path: Path
) -> None:
    folder = quantize_folder(llama, tmp_path / "quantized", FORMATS["gptq"])
    edit(folder, added(f"{LINEAR}.bias", torch.zeros(64)))
    load(folder, 0, 3)
    edit(folder, added(f"{LINEAR}.bias", torch.full((64,), 0.1)))
    with pytest.raises(CheckpointError, match=rf"without the tensor '{LINEAR}.bias'"):
        load(folder, 0, 3)


def test_a_config_that_quantizes_nothing_is_no_reason(folder: Path, kernels: None) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert inspect(folder).num_layers == 6
    load(folder, 0, 3)


def test_float_weights_and_integer_buffers_are_not_quantized(folder: Path) -> None:
    refuse_unnamed(folder, {"model.layers.0.mlp.gate.tid2eid": None, "model.layers.0.router.scale": None}.items())
    edit(folder, added("model.layers.0.attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)))
    assert inspect(folder).dtype == "float32"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.gate_proj.lora_A.weight",
        "model.layers.1.something_new",
    ],
)
def test_a_tensor_of_a_layer_that_the_model_does_not_use_is_named(folder: Path, kernels: None, name: str) -> None:
    edit(folder, added(name))
    with pytest.raises(CheckpointError, match=rf"without the tensor '{name}'.*config\.json"):
        load(folder, 0, 3)
    load(folder, 2, 6)


def test_a_tensor_that_belongs_to_the_head_is_named_where_the_head_is(folder: Path, kernels: None) -> None:
    edit(folder, added("lm_head.bias"))
    with pytest.raises(CheckpointError, match=r"'lm_head\.bias'"):
        load(folder, 3, 6)


def test_a_tensor_beside_the_layers_is_logged(folder: Path, kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, added("value_head.weight"))
    load(folder, 0, 3)
    assert "value_head.weight" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.attn.masked_bias",
        "model.layers.1.self_attn.bias",
        "model.embeddings.position_ids",
        "model.layers.6.eh_proj.weight",
        "vision_tower.encoder.layers.1.q_proj.weight",
        "mtp.layers.1.q_proj.weight",
    ],
)
def test_what_is_known_to_be_harmless_is_left_out(folder: Path, kernels: None, name: str) -> None:
    edit(folder, added(name))
    for first, last in ((0, 3), (3, 6)):
        load(folder, first, last)


def test_what_transformers_leaves_out_of_an_architecture_is_left_out(tmp_path: Path) -> None:
    config = tiny_config("axk1")
    folder = save_checkpoint(causal_class(config), config, tmp_path)
    edit(folder, added("model.layers.1.mlp.post_mlp_layernorm.weight"))
    load(folder, 0, 3)
    edit(folder, added("model.layers.1.mlp.another_layernorm.weight"))
    with pytest.raises(CheckpointError, match="another_layernorm"):
        load(folder, 0, 3)


@pytest.mark.skipif(ops.library() is None, reason="NO COMPILED KERNELS")
def test_every_rank_knows_the_biases_that_only_the_first_one_adds(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, attention_bias=True)
    for rank in (0, 1):
        parallel = TensorParallel(rank, 2, exchange_fd=make_shared_memory(2))
        load_shard(ShardSpec(str(folder), 0, 3, "float32", tp_rank=rank, tp_size=2), parallel)
