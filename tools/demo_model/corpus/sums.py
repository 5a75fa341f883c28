"""Arithmetic for the demo model: plus and minus up to ninety-nine, times up to twelve, in words and in digits."""

from __future__ import annotations

import random

from .example import Example
from .words import capital, in_words

ASK = (
    "What is {e}?",
    "What is {e}?",
    "What is {e}?",
    "What's {e}?",
    "How much is {e}?",
    "{e}",
    "{e}?",
    "Calculate {e}.",
    "Tell me what {e} is.",
    "Can you tell me what {e} is?",
    "Do you know how much {e} is?",
)


def _operand(rng: random.Random) -> int:
    return rng.randrange(21) if rng.random() < 0.3 else rng.randrange(100)


def _pair(rng: random.Random) -> tuple[int, int]:
    """Returns two operands 0..99. Small ones are more frequent, because people ask for them first."""
    if rng.random() < 0.25:
        return rng.randrange(21), rng.randrange(21)
    return _operand(rng), _operand(rng)


def _typed(rng: random.Random, value: int) -> str:
    """Returns a number word as people type it: sometimes without the hyphen."""
    return in_words(value, hyphen=" " if rng.random() < 0.1 else "-")


def _words_question(rng: random.Random, a: int, op: str, b: int, result: int, key: str) -> Example:
    form = rng.choice(ASK)
    said = f"{in_words(a)} {op} {in_words(b)} is {in_words(result)}."
    return Example(form.format(e=f"{_typed(rng, a)} {op} {_typed(rng, b)}"), capital(said), key, capital(said))


def _digits_question(rng: random.Random, a: int, sign: str, op: str, b: int, result: int, key: str) -> Example:
    asked = rng.choice((f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {op} {b}"))
    form = rng.choice((*ASK, "{e} =", "{e}="))
    said = f"{a} {sign} {b} = {result}"
    return Example(form.format(e=asked), said + ".", key, said)


def add_words(rng: random.Random) -> Example:
    """ "What is seven plus five?" """
    a, b = _pair(rng)
    key = f"{min(a, b)}+{max(a, b)}"
    if rng.random() < 0.15:
        ask = rng.choice(("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}."))
        said = capital(f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}.")
        return Example(ask.format(a=_typed(rng, a), b=_typed(rng, b)), said, key)
    return _words_question(rng, a, "plus", b, a + b, key)


def add_digits(rng: random.Random) -> Example:
    """ "What is 7 + 5?" """
    a, b = _pair(rng)
    key = f"{min(a, b)}+{max(a, b)}"
    if rng.random() < 0.15:
        ask = rng.choice(("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}."))
        return Example(ask.format(a=a, b=b), f"{a} + {b} = {a + b}.", key)
    return _digits_question(rng, a, "+", "plus", b, a + b, key)


def _minus_pair(rng: random.Random) -> tuple[int, int]:
    a, b = _pair(rng)
    return (b, a) if a < b and rng.random() < 0.7 else (a, b)


def minus_words(rng: random.Random) -> Example:
    """ "What is nine minus four?"; the result may be below zero."""
    a, b = _minus_pair(rng)
    return _words_question(rng, a, "minus", b, a - b, f"{a}-{b}")


def minus_digits(rng: random.Random) -> Example:
    """ "What is 9 - 4?" """
    a, b = _minus_pair(rng)
    return _digits_question(rng, a, "-", "minus", b, a - b, f"{a}-{b}")


def times_words(rng: random.Random) -> Example:
    """Make a question of the times table up to twelve times twelve, which is learned by heart."""
    a, b = rng.randrange(13), rng.randrange(13)
    return _words_question(rng, a, "times", b, a * b, "")


def times_digits(rng: random.Random) -> Example:
    """Make a question of the times table in digits. People write the sign as *, x or ×."""
    a, b = rng.randrange(13), rng.randrange(13)
    asked = _digits_question(rng, a, rng.choice("*x×"), "times", b, a * b, "")
    said = f"{a} x {b} = {a * b}"
    return Example(asked.question, said + ".", "", said)
