"""The served model's tokenizer, read from the checkpoint without transformers, which takes seconds to import.

tokenizer.json says all that transformers' fast tokenizers do when they encode; its post-processor adds BOS or EOS. As
in transformers 5, `add_bos_token` of tokenizer_config.json is ignored when that file is there.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stagemesh.errors import CheckpointError, InvalidRequest
from stagemesh.generation import eos_token_ids, generation_config, read_json
from stagemesh.hub.substitute import BEGIN_BYTES, in_its_place

from .chat_template import load_template
from .special_tokens import CONFIG, add_special_tokens

LONG_CHARS = 16384
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Tokenizer:
    """Encodes and decodes text, and holds the checkpoint's other settings for text. It may be used by several
    threads."""

    def __init__(self, folder: Path) -> None:
        """Reads the tokenizer of the checkpoint in `folder`. Raises CheckpointError when a file of it is damaged."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a directory: --model must name a checkpoint's directory")
        self.raw = raw = _raw(folder / "tokenizer.json")
        """None for a checkpoint without tokenizer.json, which can serve token ids only."""
        named = add_special_tokens(folder, raw)
        self.eos_ids = eos_token_ids(folder)
        self.generation = generation_config(folder)
        self.chat_template = load_template(folder, named)
        self.special_ids: frozenset[int] = frozenset()
        self._added: dict[int, str] = {}
        self._byte_level = self._byte_fallback = False
        if raw is not None:
            raw.no_truncation()
            raw.no_padding()
            raw.encode_special_tokens = read_json(folder / CONFIG).get("split_special_tokens") is True
            if "eos_token" in named and (own := raw.token_to_id(named["eos_token"])) is not None:
                self.eos_ids |= {own}
            added = raw.get_added_tokens_decoder()
            self._added = {i: token.content for i, token in added.items()}
            self.special_ids = frozenset(i for i, token in added.items() if token.special)
            kinds = _kinds(json.loads(raw.decoder.__getstate__())) if raw.decoder is not None else set()
            self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.token_bytes = functools.lru_cache(maxsize=65536)(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequest if the checkpoint has no tokenizer or `text` has lone surrogates.

        This takes up to a second per MiB and releases the GIL: call it in a thread for long texts.
        """
        if self.raw is None:
            raise InvalidRequest("the checkpoint has no tokenizer.json: send token ids as the prompt", param="prompt")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise InvalidRequest(f"the text holds a lone surrogate at character {e.start}", param="prompt") from e
        if len(text) < LONG_CHARS:
            return self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        # This leaves out the offsets, which cost a third of the time for a long text. It uses a thread pool.
        return self.raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary give no text."""
        return "" if self.raw is None else self.raw.decode(ids, skip_special_tokens=skip_special_tokens)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without encoding it."""
        # With BPE over bytes, no token has more characters than the longest of the vocabulary. In other models one
        # "unknown" token can stand for any number of characters.
        return len(text) // self._longest_token if self._byte_level or self._byte_fallback else 0

    @functools.cached_property
    def _longest_token(self) -> int:
        """Length of the vocabulary's longest token in characters."""
        assert self.raw is not None
        return max(map(len, self.raw.get_vocab(with_added_tokens=True)), default=1)

    def is_silent(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether `token` gives no text: it is outside the vocabulary, or special and skipped."""
        if self.raw is None:
            return True
        return (skip_special_tokens and token in self.special_ids) or self.raw.id_to_token(token) is None

    def token_text(self, token: int) -> str:
        """`token` alone as text. One that holds part of a character is written as OpenAI does: `bytes:\\xe2\\x82`."""
        data = self.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)

    def _token_bytes(self, token: int) -> bytes:
        """The bytes of `token` within a text."""
        if self.raw is None:
            return b""
        if token in self._added:
            return self._added[token].encode()
        piece = self.raw.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        byte = BYTE_TOKEN.match(piece) if self._byte_fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        # Decoded after another token, since some decoders strip the space at the beginning of a text.
        anchor = self.anchor
        before, both = self.raw.decode(anchor), self.raw.decode([*anchor, token], skip_special_tokens=False)
        return (both[len(before) :] if both.startswith(before) else self.raw.decode([token])).encode()

    @functools.cached_property
    def anchor(self) -> list[int]:
        """Tokens of the text "a", to decode others after them: some decoders strip the space of a text's beginning."""
        if self.raw is None:
            return []
        return self.raw.encode("a", add_special_tokens=False).ids


def _raw(file: Path) -> tokenizers.Tokenizer | None:
    if not file.exists():
        return None
    try:
        raw = tokenizers.Tokenizer.from_file(str(file))
        raw.encode("")  # A post-processor may name tokens that it does not describe.
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # A panic of tokenizers is no Exception.
        if other := in_its_place(_begin(file)):
            raise CheckpointError(f"{file} is {other}") from e
        raise CheckpointError(f"{file}: no tokenizer can be made of it ({e}); fetch the file again") from e
    return raw


def _begin(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(BEGIN_BYTES)


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    """Names of a decoder and its parts, such as {"Sequence", "ByteFallback", "Fuse"}."""
    return {str(decoder.get("type"))}.union(*map(_kinds, decoder.get("decoders", ())))


def _byte_alphabet() -> dict[str, int]:
    """Byte of each of GPT-2's printable characters."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in shown}
    table.update({chr(0x100 + n): b for n, b in enumerate(b for b in range(0x100) if b not in set(shown))})
    return table


_BYTE_OF = _byte_alphabet()
