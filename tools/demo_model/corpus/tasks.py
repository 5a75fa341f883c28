"""The demo model's corpus: questions with their answers, drawn task by task from a seeded generator.

Nothing is downloaded: all text is made here. A fixed share of every task's cases is never trained on. A checksum of the
case selects them ("12+35" in either order, in words or digits). So the trainer, the accuracy report and the tests agree
without a list. Tasks that can only be learned by heart (the times table, greetings) hold no cases out.
"""

from __future__ import annotations

import random

from .example import Example, Task
from .facts import DEFINITIONS, SYSTEM_PROMPTS
from .lists import compare, convert, count, neighbour, parity, sort_numbers, sort_words
from .sums import add_digits, add_words, minus_digits, minus_words, times_digits, times_words
from .talk import conversation, definition, repeat, unknown

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
    """Draws a training example of any task, never a held-out one."""
    task = TASKS[rng.choices(_NAMES, cum_weights=_CUMULATIVE)[0]][0]
    while (example := task(rng)).held_out:
        pass
    return example


def sample(task: str, rng: random.Random, amount: int, *, held_out: bool) -> list[Example]:
    """Draws `amount` examples of `task`, all held out or all seen in training. It may find fewer."""
    found: list[Example] = []
    for _ in range(amount * 100):
        example = TASKS[task][0](rng)
        if example.held_out == held_out:
            found.append(example)
        if len(found) == amount:
            break
    return found


def asked_carelessly(rng: random.Random, example: Example) -> str:
    """Returns the question as people type it: lower case, without a question mark, with "please"."""
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
    """Returns one or two known sentences, or random words, because users may write anything there."""
    if rng.random() < 0.75:
        return rng.choice(SYSTEM_PROMPTS)
    if rng.random() < 0.5:
        return " ".join(rng.sample(SYSTEM_PROMPTS, 2))
    words = " ".join(DEFINITIONS.values()).split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, 15)))
