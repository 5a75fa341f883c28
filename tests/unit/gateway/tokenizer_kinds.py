"""Tokenizers of each kind that checkpoints have, made here: their spaces, and bytes of unknown characters, differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<|eot|>"]
PIECES = ["▁", "a", "b", "c", "é", "日", "▁a", "▁b", "ab", "▁▁", ".", "\n"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: any byte is a character of its alphabet. Some tokens hold parts of two characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "Ġa", "Ġb", "ab", "âĤ", "¬â", "¬âĤ"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("â", "Ĥ"), ("¬", "â"), ("¬â", "Ĥ")]
    raw = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def llama2() -> tokenizers.Tokenizer:
    """Byte fallback; a text begins with a space that decoding strips."""
    raw = _fallback()
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def gemma() -> tokenizers.Tokenizer:
    """Byte fallback; spaces stay as they are."""
    raw = _fallback()
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return raw


def _fallback() -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *PIECES])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "▁")]
    return tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def metaspace() -> tokenizers.Tokenizer:
    """Unigram with Metaspace, T5's kind: what is not in the vocabulary is unknown."""
    vocab = [(token, 0.0 if token in SPECIAL else -float(i)) for i, token in enumerate([*SPECIAL, *PIECES])]
    raw = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return raw


def metaspace_fallback() -> tokenizers.Tokenizer:
    """Unigram with Metaspace and byte fallback, as SentencePiece models are converted by transformers."""
    vocab = [(token, 0.0 if token in SPECIAL else -float(i)) for i, token in enumerate([*SPECIAL, *PIECES, *BYTES])]
    raw = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    return raw


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    make.__name__: make for make in (byte_level, llama2, gemma, metaspace, metaspace_fallback)
}


def write(kind: str, folder: Path) -> Path:
    """Writes `tokenizer.json` of this kind into `folder`, which it makes."""
    raw = KINDS[kind]()
    raw.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    return folder
