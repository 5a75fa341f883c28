"""Measures the demo model's share of exact answers, greedy, with transformers, from the shipped folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .corpus.example import HELD_OUT_SHARE
from .corpus.tasks import TASKS, sample

_LONGEST_ANSWER = 160  # Tokens.
_BATCH = 100


def load(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer as any user of transformers does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    # A loaded model is already in evaluation mode.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], system: str | None = None
) -> list[str]:
    """Returns greedy answers. An answer that did not end within the limit gets "..." at its end."""
    head = [{"role": "system", "content": system}] if system else []
    said: list[str] = []
    generate = cast(Callable[..., torch.Tensor], model.generate)
    ends = torch.tensor(model.generation_config.eos_token_id)
    for start in range(0, len(questions), _BATCH):
        asked = [
            tokenizer.apply_chat_template(
                [*head, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions[start : start + _BATCH]
        ]
        inputs = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        out = generate(**inputs, do_sample=False, max_new_tokens=_LONGEST_ANSWER)
        for row in out[:, inputs["input_ids"].shape[1] :]:
            ended = bool(torch.isin(row, ends).any())
            text = str(tokenizer.decode(row, skip_special_tokens=True))
            said.append(text if ended else f"{text}...")
    return said


def accuracy(folder: Path, amount: int, seed: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Returns, for each task, the share of exact answers among `amount` held-out questions and as many seen ones.

    A task without held-out cases (learned by heart) has no "held_out" entry.
    """
    model, tokenizer = load(folder, dtype)
    report: dict[str, dict[str, float]] = {}
    for task in TASKS:
        report[task] = {}
        for name, held_out in (("held_out", True), ("seen", False)):
            examples = sample(task, random.Random(f"{seed} {task} {name}"), amount, held_out=held_out)
            if not examples:
                continue
            said = answers(model, tokenizer, [e.question for e in examples])
            right = sum(a == e.answer for a, e in zip(said, examples, strict=True))
            report[task][name] = round(right / len(examples), 4)
    return report


def table(report: dict[str, dict[str, float]]) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"| task | held out ({HELD_OUT_SHARE:.0%} of the cases) | trained on |", "| --- | --- | --- |"]
    for task, shares in report.items():
        held_out = f"{shares['held_out']:.1%}" if "held_out" in shares else "by heart"
        lines.append(f"| {task} | {held_out} | {shares['seen']:.1%} |")
    return "\n".join(lines)
