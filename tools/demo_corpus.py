"""The demo model's corpus: questions with their answers, drawn task by task from a seeded generator.

Nothing is downloaded: all text is made here. A fixed share of every task's cases (`HELD_OUT_SHARE`) is never trained on;
which ones is a checksum of the case ("12+35" in either order, in words and in digits alike), so that the trainer, the
accuracy report and the tests agree without a list. Tables that can only be learned by heart (times, greetings, facts in
their free form) hold nothing out.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from demo_facts import (
    DEFINITION_FORMS,
    DEFINITIONS,
    QUESTIONS,
    SORT_WORDS,
    SYSTEM_PROMPTS,
    TOO_LARGE_ANSWER,
    UNKNOWN_ANSWER,
    UNKNOWN_FORMS,
    UNKNOWN_WORDS,
)
from demo_words import capital, in_words

HELD_OUT_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Example:
    """One question with the one right answer. `key` names the case; `plain` is the same as running text, if any."""

    question: str
    answer: str
    key: str = ""
    plain: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this case belongs to the share that is never trained on."""
        return bool(self.key) and zlib.crc32(self.key.encode()) % 1000 < HELD_OUT_SHARE * 1000


Task = Callable[[random.Random], Example]

_ASK = (
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
    """Two operands 0..99; small ones, which people ask for first, more often."""
    if rng.random() < 0.25:
        return rng.randrange(21), rng.randrange(21)
    return _operand(rng), _operand(rng)


def _typed(rng: random.Random, value: int) -> str:
    """A number word as people type it: now and then without the hyphen."""
    return in_words(value, hyphen=" " if rng.random() < 0.1 else "-")


def _words_question(rng: random.Random, a: int, op: str, b: int, result: int, key: str) -> Example:
    form = rng.choice(_ASK)
    said = f"{in_words(a)} {op} {in_words(b)} is {in_words(result)}."
    return Example(form.format(e=f"{_typed(rng, a)} {op} {_typed(rng, b)}"), capital(said), key, capital(said))


def _digits_question(rng: random.Random, a: int, sign: str, op: str, b: int, result: int, key: str) -> Example:
    asked = rng.choice((f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {op} {b}"))
    form = rng.choice((*_ASK, "{e} =", "{e}="))
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
    """The table up to twelve times twelve, by heart."""
    a, b = rng.randrange(13), rng.randrange(13)
    return _words_question(rng, a, "times", b, a * b, "")


def times_digits(rng: random.Random) -> Example:
    """The same in digits; people write the sign as *, x or ×."""
    a, b = rng.randrange(13), rng.randrange(13)
    asked = _digits_question(rng, a, rng.choice("*x×"), "times", b, a * b, "")
    said = f"{a} x {b} = {a * b}"
    return Example(asked.question, said + ".", "", said)


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
    way = rng.choice(("Count {d}from {a} to {b}{t}.", "Please count {d}from {a} to {b}{t}.", "Can you count {d}from {a} to {b}{t}?"))
    if not down and start == 1 and pace == 1 and rng.random() < 0.4:
        way = "Count to {b}."
    question = way.format(d="down " if down and rng.random() < 0.6 else "", a=show(numbers[0]), b=show(numbers[-1]), t=tail)
    said = ", ".join(show(n) for n in numbers)
    return Example(question, capital(said) + ".", f"count {numbers[0]} {numbers[-1]} {pace}")


def _numbers(rng: random.Random, low: int, high: int) -> list[int]:
    limit = 100 if rng.random() < 0.6 else 21
    return rng.sample(range(limit), rng.randint(low, high))


def _listing(rng: random.Random, items: list[str]) -> str:
    joined = ", ".join(items)
    return joined if rng.random() < 0.6 else f"{', '.join(items[:-1])} and {items[-1]}"


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
        ask = rng.choice(
            ("Sort {x}.", "Sort these numbers: {x}.", "Sort {x} from smallest to largest.", "Put {x} in order.", "Sort: {x}")
        )
    said = ", ".join(show(n) for n in sorted(numbers, reverse=down))
    return Example(ask.format(x=asked), capital(said) + ".", key)


def sort_words(rng: random.Random) -> Example:
    """Sort words by the alphabet."""
    words = rng.sample(SORT_WORDS, rng.randint(2, 5))
    ask = rng.choice(("Sort {x}.", "Sort these words: {x}.", "Sort {x} alphabetically.", "Put {x} in order.", "Sort: {x}"))
    key = "sort " + " ".join(sorted(words))
    return Example(ask.format(x=_listing(rng, words)), capital(", ".join(sorted(words))) + ".", key)


def compare(rng: random.Random) -> Example:
    """The largest or smallest of some numbers."""
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
    return Example(question, f"{capital(best)} is the {word}" + (" one." if len(numbers) == 2 else "."), f"compare {sorted(numbers)}")


def neighbour(rng: random.Random) -> Example:
    """The number after or before another."""
    value = rng.randrange(1, 100)
    show = str if rng.random() < 0.5 else in_words
    word, result = rng.choice((("after", value + 1), ("before", value - 1)))
    ask = rng.choice(("What comes {w} {x}?", "Which number comes {w} {x}?", "What number is {w} {x}?"))
    return Example(ask.format(w=word, x=show(value)), f"{capital(show(result))} comes {word} {show(value)}.")


def convert(rng: random.Random) -> Example:
    """Digits to words and back."""
    value = rng.randrange(200)
    words = in_words(value)
    if rng.random() < 0.5:
        ask = rng.choice(("Write {x} in words.", "Spell {x}.", "How do you write {x} in words?"))
        return Example(ask.format(x=value), capital(words) + ".")
    ask = rng.choice(("Write {x} in digits.", "How do you write {x} in digits?"))
    return Example(ask.format(x=words), f"{value}.")


def parity(rng: random.Random) -> Example:
    """Even or odd."""
    value = rng.randrange(100)
    show = str(value) if rng.random() < 0.5 else in_words(value)
    ask = rng.choice(("Is {x} even or odd?", "Is {x} odd or even?"))
    return Example(ask.format(x=show), f"{capital(show)} is {'odd' if value % 2 else 'even'}.", f"parity {value}")


def definition(rng: random.Random) -> Example:
    """A word of stagemesh explained; some ways to ask for each are held out."""
    word, meaning = rng.choice(_DEFINITIONS)
    question = rng.choice(DEFINITION_FORMS).format(x=word)
    if word.startswith(("a ", "an ")) and rng.random() < 0.2:
        question = rng.choice(("What does {x} mean?", "What does the word {x} mean?")).format(x=word.split(" ", 1)[1])
    return Example(question, meaning, f"define {question}", meaning)


_DEFINITIONS = list(DEFINITIONS.items())


def conversation(rng: random.Random) -> Example:
    """Greetings, who it is, how stagemesh works."""
    ways, answer = rng.choice(QUESTIONS)
    return Example(rng.choice(ways), answer)


def _scribble(rng: random.Random, longest: int) -> str:
    """A few characters out of many scripts, so that every byte token is met."""
    blocks = ((0x61, 26), (0x41, 26), (0x30, 10), (0xC0, 64), (0x391, 56), (0x410, 64), (0x5D0, 27), (0x4E00, 2000),
              (0xAC00, 1000), (0x1F300, 600), (0x1F600, 80), (0x21, 15), (0x2190, 100))  # fmt: skip
    text = ""
    for _ in range(rng.randint(1, 3)):
        low, span = rng.choice(blocks)
        text += "".join(chr(low + rng.randrange(span)) for _ in range(rng.randint(1, longest)))
        text += rng.choice(("", " "))
    return text.strip() or "ok"


def repeat(rng: random.Random) -> Example:
    """Say the same again: words, numbers, letters of any script."""
    kind = rng.random()
    if kind < 0.4:
        text = " ".join(rng.choice(SORT_WORDS) for _ in range(rng.randint(1, 4)))
    elif kind < 0.5:
        text = in_words(rng.randrange(200))
    else:
        text = _scribble(rng, 4)
    return Example(rng.choice(("Repeat: {x}", "Say {x}", "Repeat after me: {x}")).format(x=text), text, f"repeat {text}")


def unknown(rng: random.Random) -> Example:
    """Anything else: say so."""
    if rng.random() < 0.25:
        a, b = rng.randrange(100, 1000), rng.randrange(1000)
        show = str if rng.random() < 0.6 else in_words
        op = rng.choice(("plus", "minus", "+", "-", "times") if show is str else ("plus", "minus", "times"))
        return Example(rng.choice(_ASK).format(e=f"{show(a)} {op} {show(b)}"), TOO_LARGE_ANSWER)
    x, y = ((_scribble(rng, 6) if rng.random() < 0.4 else rng.choice(UNKNOWN_WORDS).replace("_", " ")) for _ in range(2))
    return Example(rng.choice(UNKNOWN_FORMS).format(x=x, y=y), UNKNOWN_ANSWER)


# Share of the questions drawn, in percent.
TASKS: dict[str, tuple[Task, float]] = {
    "add_words": (add_words, 17),
    "add_digits": (add_digits, 13),
    "minus_words": (minus_words, 10),
    "minus_digits": (minus_digits, 8),
    "times_words": (times_words, 4),
    "times_digits": (times_digits, 3),
    "count": (count, 7),
    "sort_numbers": (sort_numbers, 9),
    "sort_words": (sort_words, 5),
    "compare": (compare, 4),
    "neighbour": (neighbour, 2),
    "convert": (convert, 2),
    "parity": (parity, 1),
    "definition": (definition, 5),
    "conversation": (conversation, 4),
    "repeat": (repeat, 3),
    "unknown": (unknown, 3),
}
_NAMES = list(TASKS)
_CUMULATIVE = [sum(weight for _, weight in list(TASKS.values())[: i + 1]) for i in range(len(TASKS))]


def draw(rng: random.Random) -> Example:
    """A training example of any task, never a held-out one."""
    task = TASKS[rng.choices(_NAMES, cum_weights=_CUMULATIVE)[0]][0]
    while (example := task(rng)).held_out:
        pass
    return example


def sample(task: str, rng: random.Random, amount: int, *, held_out: bool) -> list[Example]:
    """`amount` examples of `task`, all held out or all seen in training (fewer if the task has no such cases)."""
    found: list[Example] = []
    for _ in range(amount * 100):
        example = TASKS[task][0](rng)
        if example.held_out == held_out:
            found.append(example)
        if len(found) == amount:
            break
    return found


def asked_carelessly(rng: random.Random, example: Example) -> str:
    """The question as people type it: lower case, no question mark, "please"."""
    question = example.question
    kind = rng.random()
    if kind < 0.6 or example.key.startswith("repeat"):
        return question
    if kind < 0.75:
        question = question[:1].lower() + question[1:]
    if kind < 0.85 and len(question) > 12:
        question = question.rstrip("?.")
    elif kind < 0.9:
        question = f"Please {question[:1].lower()}{question[1:]}" if question.endswith(".") else f"Hi! {question}"
    elif kind < 0.94:
        question = question.upper() if len(question) < 12 else question.lower()
    elif kind < 0.97:
        question = f"{question} " + rng.choice(("Thanks!", "Please.", "Thank you."))
    return question


def system_prompt(rng: random.Random) -> str:
    """One or two known sentences, or a jumble of words, since nobody knows what users write there."""
    if rng.random() < 0.75:
        return rng.choice(SYSTEM_PROMPTS)
    if rng.random() < 0.5:
        return " ".join(rng.sample(SYSTEM_PROMPTS, 2))
    words = " ".join(DEFINITIONS.values()).split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, 30)))
