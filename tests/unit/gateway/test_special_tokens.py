"""Special and added tokens beside tokenizer.json: the tokenizer is that of transformers for the same folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import KINDS, write
from transformers import AutoTokenizer

from stagemesh.errors import CheckpointError
from stagemesh.gateway.text.tokenizer import Tokenizer

NEW = ["<|im_start|>", "<|im_end|>", "<pad>", "<tool>", "<|image|>", "ab c"]
"""Tokens that tokenizer.json does not have. `<s>`, `</s>` and others it has."""
TEXT = "<s>a <|im_start|> b<|im_end|>\n<tool>ab c</s><pad> <|image|> a<|eot|>"


def described(content: str, **flags: bool) -> dict[str, Any]:
    """A token as `added_tokens_decoder` describes it."""
    base = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **base, **flags}


def same_as_transformers(folder: Path, why: object = "") -> Tokenizer:
    """Asserts that both tokenizers of `folder` agree. Returns ours."""
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert ours.raw is not None
    added = ours.raw.get_added_tokens_decoder()
    assert {i: repr(t) for i, t in added.items()} == {i: repr(t) for i, t in theirs.added_tokens_decoder.items()}, why
    for text in (TEXT, *NEW, "a<|im_end|>" * 3):
        ids = ours.encode(text)
        assert ids == theirs.encode(text), (why, text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), why
    named = {theirs.eos_token_id} if theirs.eos_token_id is not None else set()
    assert ours.eos_ids == named, why
    assert {*theirs.all_special_ids} <= {*added}, why
    return ours


def make(folder: Path, config: dict[str, Any], kind: str = "byte_level", **files: dict[str, Any]) -> Path:
    """A folder with tokenizer.json of `kind` and these files."""
    write(kind, folder)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_added_tokens_decoder_are_special(tmp_path: Path, kind: str) -> None:
    decoder = {"9000": described("<|im_start|>"), "9001": described("<|im_end|>")}
    folder = make(tmp_path, {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}, kind)
    ours = same_as_transformers(folder)
    ids = ours.encode("<|im_start|>a<|im_end|>")
    assert len(ids) in (3, 4), "a special token is one token; some kinds write a space as one more"
    assert ours.decode(ids).strip() == "a"
    assert ours.eos_ids == {ids[-1]}


def test_the_older_files(tmp_path: Path) -> None:
    names = {"eos_token": described("<|im_end|>"), "additional_special_tokens": ["<|im_start|>"], "bos_token": "<s>"}
    folder = make(
        tmp_path, {"eos_token": "</s>"}, special_tokens_map=names, added_tokens={"<tool>": 5000, "<|im_end|>": 4000}
    )
    ours = same_as_transformers(folder)
    assert ours.decode(ours.encode("a<|im_end|><|im_start|><tool>")) == "a<tool>"


def test_the_older_files_override_only_names_that_all_models_have(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "image_token": "<|image|>"}
    ours = same_as_transformers(
        make(tmp_path, config, special_tokens_map={"eos_token": "<|im_end|>", "image_token": "<tool>"})
    )
    assert [len(ours.encode(text)) == 1 for text in ("<|im_end|>", "<|image|>", "<tool>")] == [True, True, False]


def test_the_older_files_do_not_count_beside_added_tokens_decoder(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "added_tokens_decoder": {"9": described("<tool>", special=False)}}
    folder = make(tmp_path, config, special_tokens_map={"eos_token": "<|im_end|>"}, added_tokens={"<|im_start|>": 7})
    ours = same_as_transformers(folder)
    assert len(ours.encode("<|im_start|>")) > 1


def test_tokenizer_json_has_the_last_word_on_an_id_of_added_tokens_json(tmp_path: Path) -> None:
    write("byte_level", tmp_path)
    there = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<|eot|>"])}
    same_as_transformers(make(tmp_path, {}, added_tokens={**there, "<tool>": 0}))


@pytest.mark.parametrize("extra", [["<|im_end|>", described("<tool>", __type="AddedToken")], {"tool_token": "<tool>"}])
def test_extra_special_tokens(tmp_path: Path, extra: Any) -> None:
    config = {"extra_special_tokens": extra, "image_token": "<|image|>", "pad_token": "<pad>"}
    ours = same_as_transformers(make(tmp_path, config))
    assert ours.decode(ours.encode("<tool><|image|>a<pad>")) == "a"


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_that_are_to_be_split(tmp_path: Path, split: bool) -> None:
    config = {"split_special_tokens": split, "added_tokens_decoder": {"600": described("<|im_end|>")}}
    ours = same_as_transformers(make(tmp_path, config))
    assert (len(ours.encode("<|im_end|>")) > 1) is split


@pytest.mark.parametrize("seed", range(60))
def test_random_files(tmp_path: Path, seed: int) -> None:
    """Any mixture of the places where tokens may stand, which may contradict each other."""
    rng = random.Random(seed)
    known = [*NEW, "<s>", "</s>", "<|eot|>", "ab"]

    def names() -> dict[str, str]:
        keys = rng.sample(["bos_token", "eos_token", "unk_token", "pad_token", "image_token"], rng.randint(0, 4))
        return {key: rng.choice(known) for key in keys}

    config: dict[str, Any] = {**names(), "add_bos_token": True}
    if rng.random() < 0.4:
        config[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = rng.sample(known, 3)
    if rng.random() < 0.5:
        listed = rng.sample(known, rng.randint(1, 5))
        numbers = rng.sample(range(280), len(listed))
        config["added_tokens_decoder"] = {
            str(n): described(text, special=rng.random() < 0.5, lstrip=rng.random() < 0.3)
            for n, text in zip(numbers, listed, strict=True)
        }
    files: dict[str, dict[str, Any]] = {}
    if rng.random() < 0.6:
        files["special_tokens_map"] = names()
        if rng.random() < 0.5:
            key = rng.choice(["extra_special_tokens", "additional_special_tokens"])
            files["special_tokens_map"][key] = rng.sample(known, 2)
    if rng.random() < 0.6:
        files["added_tokens"] = {text: rng.randrange(280) for text in rng.sample(known, 3)}
    elif rng.random() < 0.7:  # transformers does not see that this makes a token of added_tokens.json special.
        flags = {flag: rng.random() < 0.4 for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        config["eos_token"] = described(rng.choice(known), **flags) | {"__type": "AddedToken"}
    folder = make(tmp_path, config, rng.choice([*KINDS]), **files)
    same_as_transformers(folder, (seed, config, files))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config", {"eos_token": 3}, "eos_token must be a text"),
        ("tokenizer_config", {"bos_token": ["<s>"]}, "bos_token must be a text"),
        ("tokenizer_config", {"eos_token": {"special": True}}, "eos_token must be a text"),
        ("tokenizer_config", {"eos_token": {"content": 7}}, "eos_token must be a text"),
        ("tokenizer_config", {"eos_token": {"content": "x", "lstrip": "no"}}, "eos_token must be a text"),
        ("tokenizer_config", {"eos_token": "\ud800"}, "eos_token must be a text"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder must be an object"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": described("y")}}, r"added_tokens_decoder\['x'\]"),
        ("tokenizer_config", {"added_tokens_decoder": {"-1": described("y")}}, r"added_tokens_decoder\['-1'\]"),
        ("tokenizer_config", {"added_tokens_decoder": {"7": "y"}}, r"added_tokens_decoder\['7'\]"),
        ("tokenizer_config", {"added_tokens_decoder": {"7": {"special": True}}}, r"added_tokens_decoder\['7'\]"),
        ("tokenizer_config", {"extra_special_tokens": "<x>"}, "extra_special_tokens must be a list"),
        ("tokenizer_config", {"additional_special_tokens": [1]}, r"additional_special_tokens\[0\] must be"),
        ("special_tokens_map", {"eos_token": 3}, "eos_token must be a text"),
        ("added_tokens", {"<x>": "5"}, "'<x>' must have a token id, not '5'"),
        ("added_tokens", {"<x>": -5}, "'<x>' must have a token id, not -5"),
        ("added_tokens", {"<x>": True}, "'<x>' must have a token id, not True"),
        ("added_tokens", {"\ud800": 5}, "'.ud800' must be a text"),
        ("tokenizer_config", {"added_tokens_decoder": {"1" * 5000: described("y")}}, "added_tokens_decoder"),
    ],
)
def test_a_broken_entry_is_named_with_its_file(tmp_path: Path, name: str, content: dict[str, Any], says: str) -> None:
    write("byte_level", tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{name}.json: {says}"):
        Tokenizer(tmp_path)
