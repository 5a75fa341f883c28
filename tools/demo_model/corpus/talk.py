"""Conversation for the demo model: stagemesh's words, greetings, repeating a text, and "I do not know that"."""

from __future__ import annotations

import random

from .example import Example
from .facts import (
    DEFINITION_FORMS,
    DEFINITIONS,
    QUESTIONS,
    SORT_WORDS,
    TOO_LARGE_ANSWER,
    UNKNOWN_ANSWER,
    UNKNOWN_FORMS,
    UNKNOWN_WORDS,
)
from .sums import ASK
from .words import in_words


def definition(rng: random.Random) -> Example:
    """Explain a word of stagemesh. Some forms of the question are held out for each word."""
    word, meaning = rng.choice(_DEFINITIONS)
    question = rng.choice(DEFINITION_FORMS).format(x=word)
    if word.startswith(("a ", "an ")) and rng.random() < 0.2:
        question = rng.choice(("What does {x} mean?", "What does the word {x} mean?")).format(x=word.split(" ", 1)[1])
    return Example(question, meaning, f"define {question}", meaning)


_DEFINITIONS = list(DEFINITIONS.items())


def conversation(rng: random.Random) -> Example:
    """Answer greetings, and questions about the model and stagemesh."""
    ways, answer = rng.choice(QUESTIONS)
    return Example(rng.choice(ways), answer)


def _scribble(rng: random.Random, longest: int) -> str:
    """Returns a few characters of many scripts, so that every byte token occurs."""
    blocks = ((0x61, 26), (0x41, 26), (0x30, 10), (0xC0, 64), (0x391, 56), (0x410, 64), (0x5D0, 27), (0x4E00, 2000),
              (0xAC00, 1000), (0x1F300, 600), (0x1F600, 80), (0x21, 15), (0x2190, 100))  # fmt: skip
    text = ""
    for _ in range(rng.randint(1, 3)):
        low, span = rng.choice(blocks)
        text += "".join(chr(low + rng.randrange(span)) for _ in range(rng.randint(1, longest)))
        text += rng.choice(("", " "))
    return text.strip() or "ok"


def repeat(rng: random.Random) -> Example:
    """Repeat a text: words, numbers, letters of any script."""
    kind = rng.random()
    if kind < 0.4:
        text = " ".join(rng.choice(SORT_WORDS) for _ in range(rng.randint(1, 4)))
    elif kind < 0.5:
        text = in_words(rng.randrange(200))
    else:
        text = _scribble(rng, 4)
    ask = rng.choice(("Repeat: {x}", "Say {x}", "Repeat after me: {x}"))
    return Example(ask.format(x=text), text, f"repeat {text}")


def _subject(rng: random.Random) -> str:
    return _scribble(rng, 6) if rng.random() < 0.4 else rng.choice(UNKNOWN_WORDS).replace("_", " ")


def unknown(rng: random.Random) -> Example:
    """Answer that the question is unknown or too large."""
    if rng.random() < 0.25:
        a, b = rng.randrange(100, 1000), rng.randrange(1000)
        show = str if rng.random() < 0.6 else in_words
        op = rng.choice(("plus", "minus", "+", "-", "times") if show is str else ("plus", "minus", "times"))
        return Example(rng.choice(ASK).format(e=f"{show(a)} {op} {show(b)}"), TOO_LARGE_ANSWER)
    x, y = (_subject(rng), _subject(rng))
    return Example(rng.choice(UNKNOWN_FORMS).format(x=x, y=y), UNKNOWN_ANSWER)
