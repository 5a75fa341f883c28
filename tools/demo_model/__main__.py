"""Trains the model that ships with stagemesh, on generated text, within a budget of CPU time.

    python -m tools.demo_model --minutes 15 --out stagemesh/demo_model

A minute is one minute of two cores: two minutes of CPU time, whatever else the machine does. The learning rate is
constant until nearly half the budget is spent. Then it falls to zero over as many steps. So the speed of the first half
decides the number of steps, which is printed. `--steps` with that number repeats the run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

# There are two processes of one thread each (see loop.py). This must be set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.multiprocessing.spawn import spawn

from .eval import accuracy, answers, load, table
from .loop import CORES, Plan, run_rank
from .tokenizer import train_tokenizer, write_tokenizer


def _show(folder: Path) -> None:
    """Prints a few answers, for a person to read."""
    model, tokenizer = load(folder, torch.bfloat16)
    questions = ["What is seven plus five?", "What is 17 + 25?", "What is a stage?", "Count from one to ten.", "Hello!"]
    for question, answer in zip(questions, answers(model, tokenizer, questions), strict=True):
        print(f"{question} -> {answer}")


def main() -> None:
    """Makes the tokenizer, trains, writes the files, measures the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="budget in minutes of two cores")
    parser.add_argument("--steps", type=int, help="exactly so many steps, instead of a budget")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--peak", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--cases", type=int, default=200, help="questions per task in the accuracy report")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    torch.set_num_threads(CORES)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(train_tokenizer(options.seed), options.out)
    with tempfile.TemporaryDirectory() as scratch:
        meeting = Path(scratch).resolve() / "rendezvous"
        plan = Plan(options.seed, options.minutes, options.steps, options.peak, options.out, meeting)
        spawn(run_rank, args=(plan,), nprocs=CORES)  # type: ignore[no-untyped-call]
        run = json.loads(meeting.with_name("run.json").read_text())
    _show(options.out)
    report = accuracy(options.out, options.cases, options.seed, torch.bfloat16)
    print(table(report))
    about = {
        "seed": options.seed,
        **run,
        "dtype": "bfloat16",
        "cases_per_task": options.cases,
        "accuracy": report,
    }
    (options.out / "accuracy.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
