"""Order for the demo model: counting, sorting, comparing, neighbours, even and odd; and digits into words."""

from __future__ import annotations

import random

from .example import Example
from .facts import SORT_WORDS
from .words import capital, in_words

_COUNT = (
    "Count {d}from {a} to {b}{t}.",
    "Please count {d}from {a} to {b}{t}.",
    "Can you count {d}from {a} to {b}{t}?",
)


def count(rng: random.Random) -> Example:
    """Count up or down, by one, two, five or ten, in words or digits."""
    pace = rng.choice((1, 1, 1, 1, 1, 1, 2, 5, 10))
    length = rng.randrange(2, 13) if rng.random() < 0.85 else rng.randrange(13, 31)
    length = min(length, 99 // pace + 1)
    start = rng.randrange(0, 101 - pace * (length - 1)) if rng.random() < 0.5 else rng.choice((0, 1, pace))
    numbers = [n for n in range(start, start + pace * length, pace) if n <= 100]
    down = rng.random() < 0.3
    if down:
        numbers.reverse()
    show = str if rng.random() < 0.4 else in_words
    tail = "" if pace == 1 else f" by {show(pace)}s"
    way = rng.choice(_COUNT)
    if not down and start == 1 and pace == 1 and rng.random() < 0.4:
        way = "Count to {b}."
    downwards = "down " if down and rng.random() < 0.6 else ""
    question = way.format(d=downwards, a=show(numbers[0]), b=show(numbers[-1]), t=tail)
    said = ", ".join(show(n) for n in numbers)
    return Example(question, capital(said) + ".", f"count {numbers[0]} {numbers[-1]} {pace}")


def _numbers(rng: random.Random, low: int, high: int) -> list[int]:
    limit = 100 if rng.random() < 0.6 else 21
    return rng.sample(range(limit), rng.randint(low, high))


def _listing(rng: random.Random, items: list[str]) -> str:
    joined = ", ".join(items)
    return joined if rng.random() < 0.6 else f"{', '.join(items[:-1])} and {items[-1]}"


_SORT_NUMBERS = (
    "Sort {x}.",
    "Sort these numbers: {x}.",
    "Sort {x} from smallest to largest.",
    "Put {x} in order.",
    "Sort: {x}",
)
_SORT_WORDS = ("Sort {x}.", "Sort these words: {x}.", "Sort {x} alphabetically.", "Put {x} in order.", "Sort: {x}")


def sort_numbers(rng: random.Random) -> Example:
    """Sort three to six different numbers, upwards or downwards."""
    numbers = _numbers(rng, 2, 6)
    show = str if rng.random() < 0.5 else in_words
    down = rng.random() < 0.25
    asked = _listing(rng, [show(n) for n in numbers])
    key = "sort " + " ".join(map(str, sorted(numbers)))
    if down:
        ask = rng.choice(("Sort {x} from largest to smallest.", "Sort {x} downwards.", "Sort {x} in descending order."))
    else:
        ask = rng.choice(_SORT_NUMBERS)
    said = ", ".join(show(n) for n in sorted(numbers, reverse=down))
    return Example(ask.format(x=asked), capital(said) + ".", key)


def sort_words(rng: random.Random) -> Example:
    """Sort words by the alphabet."""
    words = rng.sample(SORT_WORDS, rng.randint(2, 5))
    ask = rng.choice(_SORT_WORDS)
    key = "sort " + " ".join(sorted(words))
    return Example(ask.format(x=_listing(rng, words)), capital(", ".join(sorted(words))) + ".", key)


def compare(rng: random.Random) -> Example:
    """Find the largest or smallest of some numbers."""
    numbers = _numbers(rng, 2, 5)
    show = str if rng.random() < 0.5 else in_words
    large = rng.random() < 0.5
    asked = [show(n) for n in numbers]
    if len(numbers) == 2:
        word = rng.choice(("larger", "bigger", "greater") if large else ("smaller",))
        question = f"Which is {word}, {asked[0]} or {asked[1]}?"
    else:
        word = rng.choice(("largest", "biggest") if large else ("smallest",))
        question = f"Which is the {word} of {_listing(rng, asked)}?"
    best = show(max(numbers) if large else min(numbers))
    said = f"{capital(best)} is the {word}" + (" one." if len(numbers) == 2 else ".")
    return Example(question, said, f"compare {sorted(numbers)}")


def neighbour(rng: random.Random) -> Example:
    """Name the number after or before another one."""
    value = rng.randrange(1, 100)
    show = str if rng.random() < 0.5 else in_words
    word, result = rng.choice((("after", value + 1), ("before", value - 1)))
    ask = rng.choice(("What comes {w} {x}?", "Which number comes {w} {x}?", "What number is {w} {x}?"))
    return Example(ask.format(w=word, x=show(value)), f"{capital(show(result))} comes {word} {show(value)}.")


def convert(rng: random.Random) -> Example:
    """Convert digits to words, or words to digits."""
    value = rng.randrange(200)
    words = in_words(value)
    if rng.random() < 0.5:
        ask = rng.choice(("Write {x} in words.", "Spell {x}.", "How do you write {x} in words?"))
        return Example(ask.format(x=value), capital(words) + ".")
    ask = rng.choice(("Write {x} in digits.", "How do you write {x} in digits?"))
    return Example(ask.format(x=words), f"{value}.")


def parity(rng: random.Random) -> Example:
    """Say whether a number is even or odd."""
    value = rng.randrange(100)
    show = str(value) if rng.random() < 0.5 else in_words(value)
    ask = rng.choice(("Is {x} even or odd?", "Is {x} odd or even?"))
    return Example(ask.format(x=show), f"{capital(show)} is {'odd' if value % 2 else 'even'}.", f"parity {value}")
