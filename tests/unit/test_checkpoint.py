"""What the coordinator reads of a checkpoint: counts, fingerprints, and damage named with its file and its fix."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagemesh.checkpoint import fingerprint, inspect, weight_files, weight_map
from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.safetensors_header import read_header
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

INDEX = "model.safetensors.index.json"
H, M, V, L, N, K, D = 32, 64, 100, 4, 4, 2, 8  # hidden, MLP, vocabulary, layers, heads, KV heads, head size


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": L, "hidden_size": H,
        "intermediate_size": M, "num_attention_heads": N, "num_key_value_heads": K, "vocab_size": V,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "dtype": "float32", "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    }  # fmt: skip
    return {**base, **changes}


def llama_shapes(layers: int = L, *, head: bool = True, prefix: str = "model.") -> dict[str, list[int]]:
    shapes = {f"{prefix}embed_tokens.weight": [V, H], f"{prefix}norm.weight": [H]}
    for i in range(layers):
        at = f"{prefix}layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": [K * D, H] for n in "kv"}
        shapes |= {f"{at}self_attn.q_proj.weight": [N * D, H], f"{at}self_attn.o_proj.weight": [H, N * D]}
        shapes |= {f"{at}mlp.{n}_proj.weight": [M, H] for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": [H, M], f"{at}input_layernorm.weight": [H]}
        shapes |= {f"{at}post_attention_layernorm.weight": [H]}
    if head:
        shapes["lm_head.weight"] = [V, H]
    return shapes


def write_safetensors(path: Path, shapes: dict[str, list[int]], seed: int = 0) -> None:
    header, at, random = {}, 0, np.random.default_rng(seed)
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + random.bytes(at))


def make(folder: Path, shapes: dict[str, list[int]] | None = None, seed: int = 0, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", shapes or llama_shapes(), seed)
    return folder


def make_sharded(folder: Path) -> Path:
    make(folder)
    (folder / "model.safetensors").unlink()
    shapes, weight_map = llama_shapes(), {}
    names = list(shapes)
    for index, part in enumerate((names[:10], names[10:])):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        write_safetensors(folder / file, {name: shapes[name] for name in part}, index)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


LAYER_MATRICES = 2 * K * D * H + 2 * N * D * H + 3 * M * H
LAYER = LAYER_MATRICES + 2 * H


@pytest.mark.parametrize("sharded", [False, True])
def test_counts_are_those_of_the_headers(tmp_path: Path, sharded: bool) -> None:
    info = inspect(make_sharded(tmp_path / "m") if sharded else make(tmp_path / "m"))
    assert (info.num_layers, info.hidden_size, info.vocab_size, info.dtype) == (L, H, V, "float32")
    assert (info.num_kv_heads, info.kv_elements_per_token) == (K, 2 * K * D)
    assert [part.parameters for part in info.layers] == [LAYER] * L
    assert info.layers[0].flops_per_token == 2 * LAYER_MATRICES
    assert info.embedding.parameters == V * H
    assert info.embedding.flops_per_token == 0
    assert info.head.parameters == V * H + H
    assert not info.tied
    assert info.total_parameters == L * LAYER + 2 * V * H + H


def test_a_tied_embedding_counts_on_both_ends(tmp_path: Path) -> None:
    info = inspect(make(tmp_path / "m", llama_shapes(head=False), tie_word_embeddings=True))
    assert info.tied
    assert info.embedding.parameters == V * H
    assert info.head.parameters == V * H + H
    assert info.total_parameters == L * LAYER + V * H + H


def test_dummy_needs_the_config_alone_and_agrees_with_the_files(tmp_path: Path) -> None:
    real = inspect(make(tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors").unlink()
    dummy = inspect(tmp_path / "m", "dummy")
    assert (dummy.layers, dummy.embedding, dummy.head) == (real.layers, real.embedding, real.head)


def test_a_nested_text_config_is_the_decoder(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", llama_shapes(prefix="model.language_model."))
    text = config()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["SomeForConditionalGeneration"], "model_type": "some", "text_config": text})
    )
    info = inspect(folder)
    assert (info.num_layers, info.hidden_size) == (L, H)
    assert info.layers[3].parameters == LAYER


def test_only_the_routed_experts_cost_flops(tmp_path: Path) -> None:
    shapes = {k: v for k, v in llama_shapes().items() if ".mlp." not in k}
    for i in range(L):
        shapes |= {f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": [M, H] for e in range(8)}
    info = inspect(make(tmp_path / "m", shapes, num_local_experts=8, num_experts_per_tok=2))
    attention = 2 * K * D * H + 2 * N * D * H
    assert info.layers[0].parameters == attention + 2 * H + 8 * M * H
    assert info.layers[0].flops_per_token == 2 * (attention + 2 * M * H)


def test_gpt_neox_names(tmp_path: Path) -> None:
    shapes = {"gpt_neox.embed_in.weight": [V, H], "embed_out.weight": [V, H], "gpt_neox.final_layer_norm.weight": [H]}
    shapes |= {f"gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight": [M, H] for i in range(L)}
    info = inspect(make(tmp_path / "m", shapes, model_type="gpt_neox"))
    assert info.layers[2].parameters == M * H
    assert (info.embedding.parameters, info.head.parameters) == (V * H, V * H + H)


class TestFingerprint:
    def test_is_the_same_wherever_the_files_lie(self, tmp_path: Path) -> None:
        assert fingerprint(make(tmp_path / "a")) == fingerprint(make(tmp_path / "b"))

    def test_tells_equal_shapes_with_other_weights_apart(self, tmp_path: Path) -> None:
        assert fingerprint(make(tmp_path / "a", seed=1)) != fingerprint(make(tmp_path / "b", seed=2))

    @pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
    def test_sees_one_tensor_change(self, tmp_path: Path, name: str) -> None:
        before = fingerprint(make(tmp_path / "a"))
        path = tmp_path / "a" / "model.safetensors"
        tensor = read_header(path)[name]
        raw = bytearray(path.read_bytes())
        for k in range(tensor.offset, tensor.offset + tensor.nbytes):
            raw[k] ^= 0xFF
        path.write_bytes(raw)
        assert fingerprint(tmp_path / "a") != before

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
    def test_covers_config_and_tokenizer(self, tmp_path: Path, name: str) -> None:
        before = fingerprint(make(tmp_path / "a"))
        path = tmp_path / "a" / name
        path.write_text(path.read_text() + " ")
        assert fingerprint(tmp_path / "a") != before

    def test_of_dummy_weights_is_the_config_alone(self, tmp_path: Path) -> None:
        one = fingerprint(make(tmp_path / "a", seed=1), "dummy")
        assert one == fingerprint(make(tmp_path / "b", seed=2), "dummy")
        assert one != fingerprint(make(tmp_path / "c", vocab_size=V + 1), "dummy")


class TestDamage:
    """Each error names the file, says what is wrong, and what to do."""

    def check(self, folder: Path, *words: str, kind: type[CheckpointError] = CheckpointError) -> None:
        with pytest.raises(kind) as e:
            inspect(folder)
        for word in words:
            assert word in e.value.message, e.value.message

    def test_no_such_folder(self, tmp_path: Path) -> None:
        self.check(tmp_path / "none", "none", "no such directory", "give the folder")

    def test_no_config(self, tmp_path: Path) -> None:
        self.check(tmp_path, "config.json", "no such file", "give a Hugging Face checkpoint")

    @pytest.mark.parametrize("text", ["{", '{"a": 1', "\xff"])
    def test_broken_config(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        self.check(tmp_path, "config.json", "not valid JSON", "fetch the file again")

    def test_a_config_that_is_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("[]")
        self.check(tmp_path, "config.json", "a JSON object is expected")

    @pytest.mark.parametrize("value", [0, -3, "twelve", True])
    def test_a_layer_count_that_is_none(self, tmp_path: Path, value: object) -> None:
        self.check(make(tmp_path / "m", num_hidden_layers=value), "config.json", "num_hidden_layers", repr(value))

    def test_not_a_language_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        self.check(tmp_path, "num_hidden_layers", "decoder-only")

    def test_quantized(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "m", quantization_config={"quant_method": "aqlm"})
        self.check(folder, "quantized", "bfloat16", kind=UnsupportedModel)

    def test_no_weights(self, tmp_path: Path) -> None:
        (make(tmp_path / "m") / "model.safetensors").unlink()
        self.check(tmp_path / "m", "neither model.safetensors nor", "--load-format dummy")

    def test_index_missing(self, tmp_path: Path) -> None:
        (make_sharded(tmp_path / "m") / INDEX).unlink()
        self.check(tmp_path / "m", INDEX, "missing")

    def test_index_names_a_missing_file(self, tmp_path: Path) -> None:
        (make_sharded(tmp_path / "m") / "model-00002-of-00002.safetensors").unlink()
        self.check(tmp_path / "m", "index.json", "model-00002-of-00002.safetensors", "fetch the missing")

    @pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        path = make(tmp_path / "m") / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.check(tmp_path / "m", "model.safetensors", "truncated", "fetch the file again")

    def test_header_that_is_no_json(self, tmp_path: Path) -> None:
        path = make(tmp_path / "m") / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[8] = 0xFF
        path.write_bytes(raw)
        self.check(tmp_path / "m", "model.safetensors", "broken safetensors header")

    def test_shape_and_bytes_disagree(self, tmp_path: Path) -> None:
        path = make(tmp_path / "m") / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"shape": [100, 32]', b'"shape": [101, 32]', 1))
        self.check(tmp_path / "m", "embed_tokens", "[101, 32]")

    def test_a_layer_is_missing(self, tmp_path: Path) -> None:
        self.check(make(tmp_path / "m", llama_shapes(3)), "4 layers", "none of layer 3")

    @pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 7}}'])
    def test_an_index_without_files(self, tmp_path: Path, content: str) -> None:
        (make_sharded(tmp_path / "m") / INDEX).write_text(content)
        self.check(tmp_path / "m", INDEX, "no weight_map", "fetch the file again")

    @pytest.mark.parametrize("file", ["/etc/passwd", "../other/model.safetensors"])
    def test_an_index_that_leads_out_of_the_folder(self, tmp_path: Path, file: str) -> None:
        (make_sharded(tmp_path / "m") / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        self.check(tmp_path / "m", INDEX, "files of this folder")

    def test_a_tensor_is_not_in_the_file_that_the_index_names(self, tmp_path: Path) -> None:
        index = make_sharded(tmp_path / "m") / INDEX
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(content))
        self.check(tmp_path / "m", "'lm_head.weight' should be in", "model-00001-of-00002.safetensors")

    def test_no_head_though_it_is_not_tied(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "m", llama_shapes(head=False), tie_word_embeddings=False)
        self.check(folder, "no output head", "tie_word_embeddings is false", "fetch the missing files")


class TestWhichFilesAreMeant:
    """One function says it for everybody who reads weights."""

    def test_a_single_file_beside_an_index_of_others_is_ambiguous(self, tmp_path: Path) -> None:
        folder = make_sharded(tmp_path / "m")
        write_safetensors(folder / "model.safetensors", llama_shapes())
        spec = ShardSpec(str(folder), 0, 2, "float32")
        for look in (
            lambda: inspect(folder),
            lambda: fingerprint(folder),
            lambda: load_shard(spec, TensorParallel()),
            lambda: load_shard(replace(spec, enforce_eager=True), TensorParallel()),
        ):
            with pytest.raises(CheckpointError, match=r"model\.safetensors lies beside.*not clear.*remove"):
                look()

    def test_an_index_that_names_the_single_file_is_not(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "m")
        alone = weight_map(folder), inspect(folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(llama_shapes(), "model.safetensors")}))
        assert (weight_map(folder), inspect(folder)) == alone
        assert [path.name for path in weight_files(folder)] == ["model.safetensors"]

    def test_tensors_that_the_index_leaves_out_are_read_by_nobody(self, tmp_path: Path) -> None:
        folder = make_sharded(tmp_path / "m")
        before = inspect(folder)
        write_safetensors(folder / "model-00002-of-00002.safetensors", llama_shapes() | {"lm_head.bias": [V]})
        assert inspect(folder) == before
        assert "lm_head.bias" not in weight_map(folder)

    @pytest.mark.parametrize("sharded", [False, True])
    def test_the_fingerprint_covers_every_file_that_is_read(self, tmp_path: Path, sharded: bool) -> None:
        folder = make_sharded(tmp_path / "m") if sharded else make(tmp_path / "m")
        seen = {fingerprint(folder)}
        for path in sorted(set(weight_map(folder).values())):
            raw = bytearray(path.read_bytes())
            half = len(raw) // 2
            raw[-half:] = bytes(half)
            path.write_bytes(raw)
            seen.add(fingerprint(folder))
        assert len(seen) == 1 + len(weight_files(folder))


class TestTied:
    """As transformers: what is stored is used, and the embedding is the head only if one of both is stored."""

    @pytest.mark.parametrize("tie", [True, False])
    def test_a_stored_head_is_counted_whatever_the_config_says(self, tmp_path: Path, tie: bool) -> None:
        info = inspect(make(tmp_path / "m", tie_word_embeddings=tie))
        assert not info.tied
        assert info.total_parameters == L * LAYER + 2 * V * H + H

    def test_a_head_alone_is_the_embedding_too(self, tmp_path: Path) -> None:
        shapes = llama_shapes()
        del shapes["model.embed_tokens.weight"]
        info = inspect(make(tmp_path / "m", shapes, tie_word_embeddings=True))
        assert info.tied
        assert (info.embedding.parameters, info.head.parameters) == (V * H, V * H + H)
        assert info.total_parameters == L * LAYER + V * H + H


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 512),
        ({"rope_scaling": None}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}, "original_max_position_embeddings": 256}, 1024),
        ({"rope_parameters": {"rope_type": "yarn", "factor": None}}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 1280),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 128}}, 1024),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}}, 512),
        ({"rope_scaling": {"type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_scaling": {"type": "su", "factor": 8.0}}, 512),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 4.0},
                    "sliding_attention": {"rope_type": "default"},
                    "other": None,
                }
            },
            2048,
        ),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
        ({"model_type": "cohere", "model_max_length": 4096}, 4096),
    ],
)
def test_the_longest_sequence_is_that_of_the_scaled_rotary_embedding(
    tmp_path: Path, changes: dict[str, Any], longest: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(**changes)))
    assert inspect(tmp_path, "dummy").max_position_embeddings == longest
