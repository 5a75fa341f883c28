"""Trains and writes the demo model's tokenizer: byte-level BPE, which decodes any encoded text unchanged."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .chat import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, document
from .corpus.words import capital, in_words

VOCABULARY = 768
MAX_POSITIONS = 4096


def train_tokenizer(seed: int, documents: int = 40_000) -> Tokenizer:
    """Trains BPE over the corpus. Digits stay single. Number words are repeated, so that each becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    texts = [document(rng) for _ in range(documents)]
    for token in SPECIAL_TOKENS:
        texts = [text.replace(token, "\n") for text in texts]
    words = [in_words(n) for n in (*range(20), *range(20, 100, 10))] + ["hundred", "minus"]
    texts += [form for word in words for form in (word, capital(word), f" {word}") for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) into `folder`."""
    # There is no indentation, because the list of merges would double the size.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
