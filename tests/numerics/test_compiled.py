"""Every architecture through the compiled kernels: the logits of transformers' modules, whole and over two ranks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import tiny_config
from chain import Chain, Row
from tiny_models import save_checkpoint

from stagemesh.models.architectures import ARCHITECTURES
from stagemesh.stage_worker.messages.shared_memory import make_shared_memory
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.plain.hf import causal_class
from stagemesh.stage_worker.native import ops
from stagemesh.stage_worker.native.shard import NativeShard

pytestmark = [
    pytest.mark.skipif(ops.library() is None, reason="NO COMPILED KERNELS: not built, or a processor without AVX512"),
    pytest.mark.filterwarnings("ignore"),
]
VERIFIED = sorted(name for name, known in ARCHITECTURES.items() if known.verified)
PLAIN = {"apertus", "beam"}
"""Model types with a part that is none of the known."""
IN_CI = 3
"""One of so many; `make numerics` goes through all."""
BOUNDS = (0, 2, 5)
EACH = pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.slow if at % IN_CI else ())
        for at, name in enumerate(name for name in VERIFIED if name not in PLAIN)
    ],
)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG, SHORT = tokens(150, 1), tokens(37, 2)
TABLES = [list(range(20, 8, -1)), [0, 2, 4], [31]]
STEPS = [
    [Row(LONG[:101], 0, TABLES[0], True), Row(SHORT[:20], 0, TABLES[1], True), Row([7], 0, TABLES[2], True)],
    [Row(LONG[101:], 101, TABLES[0], True), Row(SHORT[20:], 20, TABLES[1], True), Row([9], 1, TABLES[2], True)],
    [Row([5], 150, TABLES[0], True), Row([6], 37, TABLES[1], True), Row([7], 2, TABLES[2], True)],
]
"""Prompt chunks and decode rows together, pages out of order, contexts beyond the window of 40."""


@pytest.fixture
def model(model_type: str, tmp_path: Path) -> Path:
    config = tiny_config(model_type)
    return save_checkpoint(causal_class(config), config, tmp_path)


def chain_of(model: Path, **settings: Any) -> Chain:
    chain = Chain(model, BOUNDS, **settings)
    assert all(isinstance(shard, NativeShard) for shard in chain.shards) != bool(settings.get("enforce_eager"))
    return chain


def logits(model: Path, **settings: Any) -> list[torch.Tensor]:
    chain = chain_of(model, **settings)
    return [chain.step(rows) for rows in STEPS]


def worst(some: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(some, other, strict=True))


@EACH
def test_in_fp32_they_agree_to_rounding(model: Path) -> None:
    assert worst(logits(model), logits(model, enforce_eager=True)) < 1e-5


@EACH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_they_are_about_as_near_to_fp32_as_the_modules_are(model: Path, dtype: str) -> None:
    """Row by row, and not for all: where two experts score nearly the same, rounding decides which one a token uses."""
    exact = torch.cat(logits(model))
    ours, theirs = (torch.cat(logits(model, dtype=dtype, enforce_eager=eager)) for eager in (False, True))

    def error(got: torch.Tensor) -> float:
        return float(((got - exact).norm(dim=1) / exact.norm(dim=1)).quantile(0.2))

    assert error(ours) < 1.6 * error(theirs)


@EACH
def test_a_row_gives_the_same_bits_whatever_else_is_in_its_step(model: Path) -> None:
    chain = chain_of(model, dtype="bfloat16")
    together = [chain.step(rows) for rows in STEPS]
    alone = chain_of(model, dtype="bfloat16")
    for start in range(0, 150, 13):
        last = alone.step([Row(LONG[start : start + 13], start, TABLES[0], True)])
    assert torch.equal(last[0], together[1][0])
    assert torch.equal(alone.step([Row([5], 150, TABLES[0], True)])[0], together[2][0])


@EACH
def test_two_ranks_together_give_what_one_gives(model: Path) -> None:
    got: list[Any] = [None, None]
    memory = make_shared_memory(2)

    def compute(rank: int) -> None:
        try:
            parallel = TensorParallel(rank, 2, exchange_fd=os.dup(memory), timeout_s=60)
            chain = chain_of(model, parallel=parallel)
            got[rank] = chain, [chain.step(rows) for rows in STEPS]
        except BaseException as e:
            got[rank] = e
            raise

    ranks = [threading.Thread(target=compute, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    whole = chain_of(model)
    chain, results = got[0]
    assert worst(results, [whole.step(rows) for rows in STEPS]) < 1e-5
    assert chain.shards[0].weight_bytes < 0.8 * whole.shards[0].weight_bytes
