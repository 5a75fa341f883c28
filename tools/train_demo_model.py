"""Trains the model that ships with stagemesh, on text that it makes itself, within a budget of CPU time.

    python tools/train_demo_model.py --minutes 15 --out stagemesh/demo_model

A minute is one minute of two cores: two minutes of this process's own CPU time, whatever else runs beside it. The
learning rate holds until half the budget is spent, then falls to nothing over as many steps; so the number of steps
comes out of the first half's speed, and is printed. `--steps` with that number repeats the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from demo_batches import Batches
from demo_eval import accuracy, answers, load, table
from demo_net import DemoNet, Shape, write_model
from demo_tokenizer import train_tokenizer, write_tokenizer

CORES = 2
WARM_UP_STEPS = 50
STABLE_SHARE = 0.5
LONG_ROWS_SHARE = 0.85  # From here on rows are longer, for conversations of several turns.
SHORT_ROWS = (64, 128)  # rows, tokens a row
LONG_ROWS = (16, 512)


def cpu_minutes() -> float:
    """Minutes of `CORES` cores that this process and its children have used."""
    times = os.times()
    return (times.user + times.system + times.children_user + times.children_system) / 60 / CORES


def rate(step: int, total: int | None) -> float:
    """The learning rate's share of its peak: warm-up, a plateau, then a straight line to zero at `total`."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if total is None or step < total * STABLE_SHARE:
        return warm
    return warm * (total - step) / (total - total * STABLE_SHARE)


def optimizers(net: DemoNet, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in net.layers.parameters() if p.ndim == 2]
    others = [p for p in net.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(net: DemoNet, batches: Batches, minutes: float, steps: int | None, peak: float) -> tuple[int, int]:
    """Trains until the budget or `steps` is reached; returns the steps made and the tokens seen."""
    groups = optimizers(net, peak)
    began = cpu_minutes()
    step, tokens, shown = 0, 0, time.monotonic()
    total = steps
    while total is None or step < total:
        used = cpu_minutes() - began
        if total is None and used >= minutes * STABLE_SHARE:
            total = math.ceil(step / STABLE_SHARE)
            print(f"half the budget is spent: {total} steps in all", flush=True)
        long_rows = total is not None and step >= total * LONG_ROWS_SHARE
        rows, length = LONG_ROWS if long_rows else SHORT_ROWS
        ids, targets = batches.next(rows, length)
        for group in groups:
            for parameters in group.param_groups:
                parameters["lr"] = peak * rate(step, total)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in groups:
            group.step()
            group.zero_grad()
        step, tokens = step + 1, tokens + ids.numel()
        if step % 50 == 0:
            now = time.monotonic()
            print(f"step {step} loss {loss.item():.4f} {used:.2f} min {(now - shown) / 50 * 1e3:.0f} ms/step", flush=True)
            shown = now
    return step, tokens


def main() -> None:
    """Tokenizer, training, files, accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="budget in minutes of two cores")
    parser.add_argument("--steps", type=int, help="exactly so many steps, instead of a budget")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--peak", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--cases", type=int, default=200, help="questions per task in the accuracy report")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    torch.manual_seed(options.seed)
    torch.set_num_threads(CORES)
    began = cpu_minutes()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(options.seed)
    net = DemoNet(Shape(vocab=tokenizer.get_vocab_size()))
    print(f"{sum(p.numel() for p in net.parameters())} parameters, {tokenizer.get_vocab_size()} tokens in the vocabulary")
    batches = Batches(tokenizer, options.seed + 1)
    budget = options.minutes - (cpu_minutes() - began)
    steps, tokens = train(net, batches, budget, options.steps, options.peak)
    used = cpu_minutes() - began
    write_tokenizer(tokenizer, options.out)
    write_model(net, options.out)

    model, shipped_tokenizer = load(options.out, torch.bfloat16)
    questions = ["What is seven plus five?", "What is 17 + 25?", "What is a stage?", "Count from one to ten."]
    for question, answer in zip(questions, answers(model, shipped_tokenizer, questions), strict=True):
        print(f"{question} -> {answer}")
    report = accuracy(options.out, options.cases, options.seed, torch.bfloat16)
    print(table(report))
    print(f"steps {steps}, tokens {tokens}, minutes of two cores {used:.1f}")
    about = {
        "seed": options.seed,
        "steps": steps,
        "tokens": tokens,
        "two_core_minutes": round(used, 1),
        "dtype": "bfloat16",
        "cases_per_task": options.cases,
        "accuracy": report,
    }
    (options.out / "accuracy.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
