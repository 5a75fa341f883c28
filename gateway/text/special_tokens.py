"""Special and added tokens that a checkpoint names beside tokenizer.json.

What counts, and in which order, is taken from transformers 5 (`PreTrainedTokenizerBase._from_pretrained`):
`added_tokens_decoder` in tokenizer_config.json lists all tokens. A checkpoint without it may have the older files
special_tokens_map.json and added_tokens.json. Both ways, tokens with a name (`bos_token`) and extra ones are special.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from stagemesh.errors import CheckpointError
from stagemesh.generation import read_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
"""The key of special tokens without a name, and its older name."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_special_tokens(folder: Path, raw: tokenizers.Tokenizer | None) -> dict[str, str]:
    """Adds the tokens that the files in `folder` name to `raw`, unless it has them with the same properties.

    Returns the text of each name, such as `eos_token`. Raises CheckpointError (file, key, what is wrong).
    """
    there = raw.get_added_tokens_decoder() if raw is not None else {}
    named, extra, listed = _read(folder, there)
    if raw is not None:
        shown = {repr(token) for token in there.values()}
        new = [token for _, token in sorted(listed.items()) if repr(token) not in shown]
        known = {token.content for token in [*there.values(), *new]}
        # A token that is not in the vocabulary gets the next free id, so the order counts.
        others = [*(named[name] for name in dict.fromkeys([*NAMES, *named]) if name in named), *extra]
        new += {repr(token): token for token in others if token.content not in known}.values()
        special = {token.content for token in named.values()}
        for token in new:
            token.special = token.special or token.content in special
        raw.add_tokens(new)
    return {name: token.content for name, token in named.items()}


def _read(folder: Path, taken: Container[int]) -> tuple[dict[str, AddedToken], list[AddedToken], dict[int, AddedToken]]:
    """Tokens by name, those without a name, and tokens by id. `taken`: ids that added_tokens.json cannot redefine."""
    config = read_json(folder / CONFIG)
    named = _named(config, folder / CONFIG)
    extra = _extra(config, EXTRA if config.get(EXTRA) else OLDER_EXTRA, folder / CONFIG)
    if "added_tokens_decoder" in config:
        return named, extra, _listed(config["added_tokens_decoder"], folder / CONFIG)
    told = read_json(folder / MAP)
    for name, token in _named(told, folder / MAP, special=True).items():
        if name in NAMES or name not in named:
            named[name] = token
    extra += _extra(told, EXTRA, folder / MAP, special=True)
    special = {token.content for token in [*(named[name] for name in NAMES if name in named), *extra]}
    added = _added(read_json(folder / ADDED), folder / ADDED, special)
    extra = extra or _extra(told, OLDER_EXTRA, folder / MAP, special=True)
    return named, extra, {number: token for number, token in added.items() if number not in taken}


def _named(told: Mapping[str, Any], path: Path, special: bool | None = None) -> dict[str, AddedToken]:
    """The entries of a file that give a token a name. A flag such as `add_bos_token` is none."""
    entries = {key: value for key, value in told.items() if key.endswith("_token")}
    if isinstance(told.get(EXTRA), dict):
        entries |= told[EXTRA]
    return {
        key: _token(value, path, key, special)
        for key, value in entries.items()
        if isinstance(value, str | dict) or (key in NAMES and value is not None)
    }


def _extra(told: Mapping[str, Any], key: str, path: Path, special: bool | None = None) -> list[AddedToken]:
    """The special tokens of a file that have no name: those of this key."""
    entries = told.get(key) or []
    if key == EXTRA and isinstance(entries, dict):
        return []
    if not isinstance(entries, list):
        raise _wrong(path, key, "must be a list of tokens")
    return [_token(value, path, f"{key}[{i}]", special) for i, value in enumerate(entries)]


def _listed(told: Any, path: Path) -> dict[int, AddedToken]:
    """Reads `added_tokens_decoder`: id -> token."""
    if not isinstance(told, dict):
        raise _wrong(path, "added_tokens_decoder", "must be an object of token ids and tokens")
    listed = {}
    for key, value in told.items():
        where = f"added_tokens_decoder[{key!r}]"
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and isinstance(value, dict)):
            raise _wrong(path, where, "must be an object that describes a token, by its id")
        listed[int(key)] = _token(value, path, where)
    return listed


def _added(told: Mapping[str, Any], path: Path, special: set[str]) -> dict[int, AddedToken]:
    """Reads added_tokens.json, which has the id of each text: id -> token."""
    added = {}
    for text, number in told.items():
        if type(number) is not int or number < 0:
            raise _wrong(path, repr(text), f"must have a token id, not {number!r}")
        flags = {"special": text in special, "normalized": text not in special}
        added[number] = _token({"content": text, **flags}, path, repr(text))
    return added


def _token(value: Any, path: Path, key: str, special: bool | None = None) -> AddedToken:
    """A token from its text, which is special, or from the object that describes it. `special` overrides its flag."""
    told: dict[str, Any] = {"content": value, "special": True} if isinstance(value, str) else value
    flags = {name: told[name] for name in FLAGS if name in told} if isinstance(told, dict) else {}
    if special is not None:
        flags["special"] = special
    try:
        return AddedToken(told["content"], **flags)
    except (TypeError, LookupError, ValueError) as e:
        raise _wrong(path, key, f"must be a text, or an object with the text as `content` and flags ({e})") from e


def _wrong(path: Path, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} {what}; correct it, or fetch the file again")
