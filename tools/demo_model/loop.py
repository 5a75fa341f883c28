"""The demo model's training loop: two processes of one thread each, with gradients averaged after every step.

Two processes are faster than one with two threads. A step is thousands of small operations, and threads that
synchronise after each of them lose more than half of their time on a machine with other work.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn

from .batches import Batches
from .muon import Muon
from .net import DemoNet, Shape, write_model

CORES = 2
WARM_UP_STEPS = 60
STABLE_SHARE = 0.5  # Share of the steps with a constant learning rate.
DECIDED_AT = 0.46  # Share of the budget. Later steps may cost more: rows get longer, and the machine may get busier.
LONG_ROWS_SHARE = 0.85  # From this share on, rows are longer, for conversations of several turns.
SHORT_ROWS = (24, 128)  # Rows of each process, tokens per row.
LONG_ROWS = (6, 512)


@dataclass(frozen=True)
class Plan:
    """The plan of one training run: `steps` steps, or as many as fit into `minutes` of two cores."""

    seed: int
    minutes: float
    steps: int | None
    peak: float
    folder: Path  # It has the tokenizer and gets the model.
    rendezvous: Path  # A file that does not exist yet, through which the processes find each other.


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of the children that it waited for (the compiler)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def rate(step: int, total: int | None) -> float:
    """Returns the learning rate's share of its peak: warm-up, a plateau, then linear to zero at `total`."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if total is None or step < total * STABLE_SHARE:
        return warm
    return warm * (total - step) / (total - total * STABLE_SHARE)


def _average(parameters: list[nn.Parameter], used_s: float, loss: float) -> tuple[float, float]:
    """Averages the gradients over the processes, in place. Returns their summed CPU seconds and mean loss."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([used_s, loss])])
    dist.all_reduce(flat)
    *parts, told = torch.split(flat, [*(g.numel() for g in gradients), 2])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient)).div_(CORES)
    return float(told[0]), float(told[1]) / CORES


def _compile(net: DemoNet) -> None:
    """Fuses each layer's small operations. Without a C++ compiler the run takes twice as long."""
    if shutil.which("c++") or shutil.which("g++"):
        for layer in net.layers:
            layer.compile(dynamic=False)
    else:
        print("no C++ compiler: training without torch.compile, at half the speed", flush=True)


def run_rank(rank: int, plan: Plan) -> None:
    """Runs one of `CORES` training processes. Rank 0 reports, and writes the model into `plan.folder` at the end."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{plan.rendezvous}",
        rank=rank,
        world_size=CORES,
        timeout=timedelta(minutes=5),
    )
    torch.manual_seed(plan.seed)
    tokenizer = Tokenizer.from_file(str(plan.folder / "tokenizer.json"))
    net = DemoNet(Shape(vocab=tokenizer.get_vocab_size()))
    _compile(net)
    steps, tokens, used_s = _train(net, Batches(tokenizer, plan.seed + 1 + rank), plan, report=rank == 0)
    if rank == 0:
        write_model(net, plan.folder)
        print(f"steps {steps}, tokens {tokens}, minutes of two cores {used_s / 60 / CORES:.1f}", flush=True)
        about = {"steps": steps, "tokens": tokens, "two_core_minutes": round(used_s / 60 / CORES, 2)}
        plan.rendezvous.with_name("run.json").write_text(json.dumps(about))
    dist.destroy_process_group()


def _train(net: DemoNet, batches: Batches, plan: Plan, *, report: bool) -> tuple[int, int, float]:
    """Trains until the budget is spent or the steps are done. Returns steps, tokens and CPU seconds of all."""
    parameters = list(net.parameters())
    matrices = [p for p in net.layers.parameters() if p.ndim == 2]
    inner = {id(p) for p in matrices}
    muon = Muon([*matrices])
    adam = torch.optim.AdamW([p for p in parameters if id(p) not in inner], betas=(0.9, 0.98), weight_decay=0.0)
    step, tokens, used_s, total, shown = 0, 0, 0.0, plan.steps, time.monotonic()
    while total is None or step < total:
        long_rows = total is not None and step >= total * LONG_ROWS_SHARE
        ids, targets = batches.next(*(LONG_ROWS if long_rows else SHORT_ROWS))
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(ids, targets)
        loss.backward()
        used_s, mean_loss = _average(parameters, cpu_seconds(), loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        lr = plan.peak * rate(step, total)
        adam.param_groups[0]["lr"] = lr
        muon.step(lr)
        adam.step()
        net.zero_grad()
        step, tokens = step + 1, tokens + CORES * ids.numel()
        if total is None and used_s / 60 / CORES >= plan.minutes * DECIDED_AT:
            total = math.ceil(step / STABLE_SHARE)
            if report:
                print(f"{used_s / 60 / CORES:.2f} two-core minutes are spent: {total} steps in all", flush=True)
        if report and step % 50 == 0:
            now = time.monotonic()
            spent = f"{used_s / 60 / CORES:.2f} two-core minutes, {(now - shown) / 50 * 1e3:.0f} ms a step"
            print(f"step {step} loss {mean_loss:.4f} lr {lr:.2e} {spent}", flush=True)
            shown = now
        if plan.steps is None and used_s / 60 / CORES >= plan.minutes:
            if report:
                print(f"the budget is spent at step {step} of {total}", flush=True)
            break
        if report and step % 500 == 0:  # An interrupted run leaves a model.
            write_model(net, plan.folder)
    return step, tokens, used_s
