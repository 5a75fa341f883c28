"""Loading one stage: which bytes are read, what is shared, and what a damaged checkpoint gets told."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import Chain
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, reference_greedy

from stagemesh.errors import CheckpointError, ConfigError, UnsupportedModel
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import Shard, load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native import ops

FLOAT = 4
HIDDEN, MLP, KV_WIDTH, VOCAB, LAYERS = 64, 96, 32, 260, 6
LAYER_BYTES = FLOAT * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * MLP + 2 * HIDDEN)
EMBEDDING_BYTES = FLOAT * VOCAB * HIDDEN
NORM_BYTES = FLOAT * HIDDEN


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama_tied", tmp_path_factory.mktemp("tied"))


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


@pytest.fixture(params=["kernels", "eager"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded for compiled kernels, and as on a machine that has none."""
    if request.param == "eager":
        monkeypatch.setattr(ops, "library", lambda: None)


def load(folder: Path, first: int, last: int, **settings: Any) -> Shard:
    return load_shard(replace(ShardSpec(str(folder), first, last, "float32"), **settings), TensorParallel())


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 2, 2 * LAYER_BYTES + EMBEDDING_BYTES),
        (2, 5, 3 * LAYER_BYTES),
        (5, 6, LAYER_BYTES + NORM_BYTES + EMBEDDING_BYTES),
        (0, 6, 6 * LAYER_BYTES + NORM_BYTES + 2 * EMBEDDING_BYTES),
    ],
)
def test_a_stage_reads_its_own_tensors_and_no_others(llama: Path, first: int, last: int, expected: int) -> None:
    shard = load(llama, first, last)
    assert shard.tensor_bytes_read == expected
    assert (shard.is_first, shard.is_last, shard.num_layers) == (first == 0, last == LAYERS, LAYERS)
    assert [layer.layer_idx for layer in shard.kv_layers] == list(range(first, last))
    assert {(layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim) for layer in shard.kv_layers} == {(2, 16, 16)}


def test_progress_counts_bytes_up_to_the_total(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_shard(
        ShardSpec(str(llama), 0, 2, "bfloat16"), TensorParallel(), lambda done, total: seen.append((done, total))
    )
    total = (2 * LAYER_BYTES + EMBEDDING_BYTES) // 2
    assert {pair[1] for pair in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_a_tied_embedding_is_on_both_ends_and_once_where_they_meet(tied: Path) -> None:
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert load(tied, 0, 3).tensor_bytes_read == 3 * LAYER_BYTES + EMBEDDING_BYTES
    assert load(tied, 3, 6).tensor_bytes_read == 3 * LAYER_BYTES + NORM_BYTES + EMBEDDING_BYTES
    whole = load(tied, 0, 6)
    assert whole.tensor_bytes_read == 6 * LAYER_BYTES + NORM_BYTES + EMBEDDING_BYTES
    assert whole.weight_bytes < load(tied, 0, 3).weight_bytes + load(tied, 3, 6).weight_bytes


def test_a_tied_model_is_held_whole_and_in_part_again_and_again(tied: Path) -> None:
    """As a worker does that takes others' layers over, gives them back, and takes them over once more."""
    spec = ShardSpec(str(tied), 0, 6, "float32")

    def computed(shard: Shard) -> torch.Tensor:
        shard.bind_kv(KvPool(shard.kv_layers, 2, spec.page_size, shard.dtype, shard.device))
        last_row = torch.tensor([1]) if len(shard.kv_layers) == 6 else None
        batch = StepBatch([0], [2], [[0]], spec.page_size, token_ids=torch.tensor([5, 6]), logit_rows=last_row)
        shard.prepare(batch)
        return shard.forward(batch).clone()

    fresh = {last: computed(load(tied, 0, last)) for last in (3, 6)}
    shard = None
    for last in (3, 6, 3, 6, 3):
        shard = load_shard(replace(spec, last=last), TensorParallel(), before=shard)
        assert torch.equal(computed(shard), fresh[last])


def test_a_base_model_checkpoint_serves_when_tied(tied: Path, tmp_path: Path) -> None:
    """Checkpoints saved from the base model lack the prefix of the causal one."""
    folder = Path(shutil.copytree(tied, tmp_path / "base"))

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    prompt = list(range(50))
    assert Chain(folder, (0, 3, 6)).greedy([prompt], 6) == [reference_greedy(tied, prompt, 6)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("head", ["another", "equal", "missing", "alone"])
def test_embedding_and_head_are_those_that_transformers_takes(
    tmp_path: Path, family: str, tie: bool, head: str
) -> None:
    folder = make_checkpoint(family, tmp_path, tie_word_embeddings=False)
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    names = names if family == "gpt_neox" else ("model.embed_tokens.weight", "lm_head.weight")

    def store(tensors: dict[str, torch.Tensor]) -> None:
        if head == "equal":
            tensors[names[1]] = tensors[names[0]].clone()
        elif head in ("missing", "alone"):
            del tensors[names[1] if head == "missing" else names[0]]

    edit_tensors(folder, store)
    edit_config(folder, tie_word_embeddings=tie)
    prompt = list(range(50))
    if not tie and head in ("missing", "alone"):
        with pytest.raises(CheckpointError, match="lacks 1 tensor"):
            Chain(folder, (0, 3, 6))
        return
    expected = reference_greedy(folder, prompt, 6)
    for bounds in ((0, 6), (0, 3, 6)):
        assert Chain(folder, bounds).greedy([prompt], 6) == [expected]


def test_a_checkpoint_in_several_files_reads_only_the_files_of_its_layers(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name, tensor in tensors.items():
        file = f"{name}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in weight_map:
        if ".layers.3." not in name:
            (folder / weight_map[name]).unlink()
    assert load(folder, 3, 4).tensor_bytes_read == LAYER_BYTES
    with pytest.raises(CheckpointError, match=r"cannot read .*layers\.4\..*No such file"):
        load(folder, 3, 5)


def test_dummy_weights_are_the_same_however_the_model_is_split(tied: Path, tmp_path: Path) -> None:
    shutil.copy(tied / "config.json", tmp_path)
    prompts = [list(range(40)), [7, 8, 9]]
    whole = Chain(tmp_path, (0, 6), load_format="dummy")
    tokens = whole.greedy(prompts, 8)
    assert whole.shards[0].tensor_bytes_read == 0
    assert Chain(tmp_path, (0, 1, 4, 6), load_format="dummy").greedy(prompts, 8) == tokens
    assert len({token for row in tokens for token in row}) > 3
    other = load_shard(ShardSpec(str(tmp_path), 0, 6, "float32", load_format="dummy", seed=1), TensorParallel())
    assert other.weight_bytes == whole.shards[0].weight_bytes


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(broken: Path, name: str) -> None:
    edit_tensors(broken, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor\(s\).*{name}.*download"):
        load(broken, 0, 3)
    load(broken, 3, 6)


def test_a_missing_head_is_not_taken_from_the_embedding_when_untied(broken: Path) -> None:
    edit_tensors(broken, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(broken, 3, 6)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(broken: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(broken, lambda tensors: tensors.update({name: torch.zeros(48, 64)}))
    with pytest.raises(CheckpointError, match=rf"{name}.*shape \[48, 64\].*asks for \[32, 64\]"):
        load(broken, 0, 3)


@pytest.mark.parametrize(
    ("changed", "rows", "message"),
    [
        (["w3"], None, "the checkpoint has 4 and 3 of its experts' tensors, such as .*experts.0.w1.*download it again"),
        (["w1", "w2", "w3"], None, r"has shape \[3, 192, 64\], config.json asks for \[4, 192, 64\]"),
        (["w1"], 80, r"experts.2.w1.weight.* has shape \[176, 64\], config.json asks for \[192, 64\]"),
        (["w2"], 80, r"experts.2.w2.weight.* has shape \[80, 96\], config.json asks for \[64, 96\]"),
    ],
    ids=["a tensor is missing", "an expert is missing", "gate has another shape", "down has another shape"],
)
def test_experts_that_do_not_fit_together_are_named(
    tmp_path: Path, changed: list[str], rows: int | None, message: str
) -> None:
    folder = make_checkpoint("mixtral", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in changed:
            tensor = tensors.pop(f"model.layers.1.block_sparse_moe.experts.2.{name}.weight")
            if rows is not None:
                tensors[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"] = tensor.new_ones(
                    rows, tensor.shape[1]
                )

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, 0, 3)


def test_a_truncated_file_is_named_with_both_sizes(broken: Path) -> None:
    path = broken / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors is cut short: it has {size - 1000} bytes of {size}"
    ):
        load(broken, 0, 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 4, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 9) + b"not json!", b"<html>login</html>"],
)
def test_a_file_that_is_no_safetensors_is_named(broken: Path, content: bytes) -> None:
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(broken, 0, 3)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"model_type": 7}',
        "\x00",
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}',
    ],
)
def test_a_broken_config_is_named(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json|not known"):
        load(broken, 0, 3)


def test_an_empty_folder_says_what_is_looked_for(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(tmp_path, 0, 3)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 2), (-1, 2), (2, 7)])
def test_a_range_outside_the_model_is_refused_with_the_layer_count(llama: Path, first: int, last: int) -> None:
    with pytest.raises(ConfigError, match=rf"\[{first}, {last}\).*6 decoder layers"):
        load(llama, first, last)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "of type 'spiral'"),
        ({"model_type": "gpt2"}, "declares no base_model_pp_plan"),
        ({"model_type": "mamba"}, "declares no base_model_pp_plan"),
        ({"model_type": "qwen3_next"}, "linear_attention"),
        ({"model_type": "no_such_model"}, "not known to the installed transformers"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(broken: Path, settings: dict[str, Any], reason: str) -> None:
    edit_config(broken, **settings)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        load(broken, 0, 3)
    assert len(caught.value.message) <= 200 + len(str(broken)), "one sentence"


@pytest.mark.parametrize(
    ("family", "settings", "size", "message"),
    [
        ("llama", {}, 3, "size 3 does not divide .* 4 attention heads and 2 KV heads.* works is 2"),
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
            2,
            "3 KV heads.* works is 1",
        ),
    ],
)
def test_heads_that_do_not_divide_are_refused_with_a_size_that_works(
    tmp_path: Path, family: str, settings: dict[str, Any], size: int, message: str
) -> None:
    folder = make_checkpoint(family, tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        load(folder, 0, 3, tp_size=size)
