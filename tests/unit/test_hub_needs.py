"""Which model is meant, and which of its files a stage needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import FAMILIES, by_layer, make_checkpoint, split_weights

from stagemesh.checkpoint import INDEX
from stagemesh.errors import ConfigError
from stagemesh.hub import needs
from stagemesh.hub.cache import cache_dir
from stagemesh.hub.reference import HubModel, parse, served_name
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TestReference:
    @pytest.mark.parametrize(
        ("told", "revision", "expected"),
        [
            ("org/name", None, HubModel("org/name", "main")),
            ("org/name@v1.0", None, HubModel("org/name", "v1.0")),
            ("org/name", "refs/pr/7", HubModel("org/name", "refs/pr/7")),
            ("org/name@v1", "v1", HubModel("org/name", "v1")),
            ("Org-1/Name_2.5-7B", COMMIT, HubModel("Org-1/Name_2.5-7B", COMMIT)),
            ("name", None, None),
            ("./org/name", None, None),
            ("/org/name", None, None),
            ("org/name/more", None, None),
            ("../name", None, None),
            ("org/..", None, None),
            ("", None, None),
        ],
    )
    def test_what_is_an_id(self, told: str, revision: str | None, expected: HubModel | None) -> None:
        assert parse(told, revision) == expected

    def test_a_folder_goes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "name").mkdir(parents=True)
        assert parse("org/name") is None
        assert parse("org/other") == HubModel("org/other")
        with pytest.raises(ConfigError, match="org/name is a folder"):
            parse("org/name", "v1")

    @pytest.mark.parametrize("revision", ["../../etc", "a b", "-x", "a\n", ""])
    def test_what_is_no_revision(self, revision: str) -> None:
        with pytest.raises(ConfigError, match="is not a revision of org/name"):
            parse(f"org/name@{revision}")

    def test_two_revisions(self) -> None:
        with pytest.raises(ConfigError, match="names two revisions"):
            parse("org/name@a", "b")

    def test_only_a_commit_is_one(self) -> None:
        assert HubModel("org/name", COMMIT).commit == COMMIT
        assert HubModel("org/name", COMMIT[:7]).commit is None
        assert HubModel("org/name", COMMIT).fingerprint == HubModel("mirror/name", COMMIT).fingerprint
        assert HubModel("org/name", COMMIT).fingerprint != HubModel("org/name", COMMIT[::-1]).fingerprint

    def test_it_is_served_under_its_id(self, tmp_path: Path) -> None:
        assert served_name("org/name@v1") == "org/name"
        assert served_name(str(tmp_path / "x" / ".." / "model")) == "model"


def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its documented variables, in their order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert cache_dir() == Path("/home/me/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "$HOME/cache")
    assert cache_dir() == Path("/home/me/cache")


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_loads_from_the_files_that_it_needs_alone(family: str, kernels: bool, tmp_path: Path) -> None:
    """Each tensor is in a file of its own, so that not one is taken by chance."""
    whole = split_weights(make_checkpoint(family, tmp_path / "whole"), lambda name: f"{name}.safetensors")
    tensors: dict[str, str] = json.loads((whole / INDEX).read_text())["weight_map"]
    taken: set[str] = set()
    for first, last in ((0, 2), (2, 5), (5, 6)):
        files = needs.of_layers(tensors, (first, last), 6)
        part = tmp_path / f"{first}-{last}"
        part.mkdir()
        for name in (*files, *needs.description([path.name for path in whole.iterdir()])):
            shutil.copy(whole / name, part)
        spec = ShardSpec(str(part), first, last, "float32", enforce_eager=not kernels)
        shard = load_shard(spec, TensorParallel())
        assert shard.weight_bytes > 0
        if (first, last) == (2, 5):
            assert all(any(f".{layer}." in name for layer in (2, 3, 4)) for name in files)
        taken |= set(files)
    assert taken == set(tensors.values())


def test_files_of_towers_and_further_heads_are_not_needed() -> None:
    tensors = {
        "model.embed_tokens.weight": "a",
        "model.layers.0.mlp.up_proj.weight": "b",
        "model.layers.1.mlp.up_proj.weight": "c",
        "model.layers.2.eh_proj.weight": "mtp",
        "model.norm.weight": "c",
        "lm_head.weight": "d",
        "vision_tower.blocks.0.weight": "vision",
        "model.some_scale": "e",
    }
    assert needs.of_layers(tensors, (0, 1), 2) == ["a", "b", "e"]
    assert needs.of_layers(tensors, (1, 2), 2) == ["c", "d", "e"]
    assert needs.of_layers(tensors, (0, 2), 2) == ["a", "b", "c", "d", "e"]
    del tensors["lm_head.weight"]
    assert needs.of_layers(tensors, (1, 2), 2) == ["a", "c", "e"], "the embedding is the head"


def test_what_describes_a_model_and_what_is_for_its_text() -> None:
    names = [
        *("config.json", "hf_quant_config.json", "quantize_config.json", "generation_config.json", INDEX),
        *("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json"),
        *("README.md", "model-1.safetensors", "pytorch_model.bin", "original/config.json", "vocab.json"),
    ]
    assert set(needs.description(names)) == set(names[:6])
    assert set(needs.text(names)) == set(names[6:9])


def test_the_splitter_of_these_tests() -> None:
    assert by_layer("model.layers.11.mlp.weight") == "layer-11.safetensors"
    assert by_layer("model.embed_tokens.weight") == "embedding.safetensors"
    assert by_layer("lm_head.weight") == by_layer("model.norm.weight") == "head.safetensors"
