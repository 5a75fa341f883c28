"""generation_config.json, and the ids that end a sequence: what counts, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagemesh.coordinator.build import build
from stagemesh.errors import CheckpointError
from stagemesh.generation import eos_token_ids, generation_config, read_json
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.model import DEMO_MODEL

VOCAB = 100


def folder(path: Path, generation: Any = None, config: Any = None) -> Path:
    """A folder with these contents of generation_config.json and config.json."""
    (path / "config.json").write_text(json.dumps({"vocab_size": VOCAB, **(config or {})}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_the_edges_of_each_range_count(tmp_path: Path) -> None:
    low = {"temperature": 0, "top_p": 0, "top_k": -1, "min_p": 0, "repetition_penalty": 0.01}
    read = generation_config(folder(tmp_path, {**low, "max_new_tokens": 1, "max_length": "any", "do_sample": False}))
    assert read.sampling == low
    assert read.max_new_tokens == 1
    high = {"temperature": 9.5, "top_p": 1, "top_k": 0, "min_p": 1.0}
    read = generation_config(folder(tmp_path, {**high, "repetition_penalty": None, "max_new_tokens": None}))
    assert read.sampling == high
    assert read.max_new_tokens is None
    (tmp_path / "generation_config.json").unlink()
    assert generation_config(tmp_path).sampling == {}


WRONG = [
    ("temperature", -0.1, "temperature must be at least 0, not -0.1"),
    ("temperature", "0.5", "temperature must be a number, not '0.5'"),
    ("temperature", float("nan"), "temperature must be a finite number"),
    ("top_p", -1, "top_p must be at least 0 and at most 1, not -1"),
    ("top_p", 1.5, "top_p must be at least 0 and at most 1, not 1.5"),
    ("top_p", True, "top_p must be a number, not True"),
    ("top_k", -2, "top_k must be at least -1 and at most 2147483647, not -2"),
    ("top_k", 1.5, "top_k must be a whole number, not 1.5"),
    ("top_k", 2**31, "top_k must be at least -1 and at most"),
    ("min_p", 2, "min_p must be at least 0 and at most 1, not 2"),
    ("min_p", [0.1], "min_p must be a number"),
    ("repetition_penalty", 0, "repetition_penalty must be more than 0, not 0"),
    ("repetition_penalty", {}, "repetition_penalty must be a number"),
    ("max_new_tokens", 0, "max_new_tokens must be at least 1, not 0"),
    ("max_new_tokens", "7", "max_new_tokens must be a whole number, not '7'"),
]


@pytest.mark.parametrize(("key", "value", "says"), WRONG)
def test_a_wrong_value_is_named_with_its_file_and_range(tmp_path: Path, key: str, value: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        generation_config(folder(tmp_path, {key: value}))
    assert f"generation_config.json: {says}" in refused.value.message
    assert refused.value.message.endswith("; correct it, or remove it")


@pytest.mark.parametrize(
    "value", ["3", -1, True, 2.0, VOCAB, [[3]], [3, "4"], [3, None], {"id": 3}, [3, VOCAB], "</s>"]
)
@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
def test_a_wrong_eos_id_is_named_with_its_file(tmp_path: Path, place: str, value: Any) -> None:
    told = {"eos_token_id": value}
    generation = told if place == "generation_config.json" else None
    nested = {"text_config": {"vocab_size": VOCAB, **told}, "vocab_size": 10**6}
    with pytest.raises(CheckpointError) as refused:
        eos_token_ids(folder(tmp_path, generation, nested if place == "text_config" else {} if generation else told))
    file = "generation_config.json" if generation else "config.json"
    assert f"{file}: eos_token_id must be a token id below vocab_size {VOCAB}" in refused.value.message
    assert json.dumps(value) in refused.value.message


def test_right_eos_ids(tmp_path: Path) -> None:
    assert eos_token_ids(folder(tmp_path, {"eos_token_id": [VOCAB - 1, 0]}, {"eos_token_id": 5})) == {VOCAB - 1, 0}
    assert eos_token_ids(folder(tmp_path, {"eos_token_id": None}, {"eos_token_id": 5})) == {5}
    assert eos_token_ids(folder(tmp_path, {}, {"text_config": {"eos_token_id": 7}})) == {7}
    assert eos_token_ids(folder(tmp_path, {"eos_token_id": []}, {"eos_token_id": 5})) == frozenset()


@pytest.mark.parametrize("content", ["", "{", '{"half": ', "[1]", "3", "null", "\ufffd", "[" * 100_000])
def test_broken_json_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config.json: .*fetch the file again"):
        read_json(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: .*fetch the file again"):
        read_json(file)


@pytest.mark.parametrize(
    ("told", "says"), [({"top_p": 7}, "top_p must be"), ({"eos_token_id": "3"}, "eos_token_id must be a token id")]
)
def test_the_coordinator_refuses_them_before_a_worker_starts(tmp_path: Path, told: dict[str, Any], says: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {says}"):
        build(CoordinatorSettings(model=str(tmp_path), load_format="dummy"))
