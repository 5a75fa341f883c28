"""A stage that sleeps: tokens that can be foretold, on time, and without transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.scale.mesh import PLUGIN
from benchmarks.scale.sleep_shard import FIRST_TOKEN, TOKENS, next_token
from stagemesh.errors import ConfigError
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

STEP_S = 0.02


@pytest.fixture
def folder(tmp_path: Path) -> str:
    numbers = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 256, "step_seconds": STEP_S}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stagemesh_sleep", **numbers}))
    return str(tmp_path)


def batch_of(tokens: list[int], rows: list[int]) -> StepBatch:
    """One row of `tokens`, with logits of the positions in `rows`."""
    return StepBatch([0], [len(tokens)], [[0]], 16, token_ids=torch.tensor(tokens), logit_rows=torch.tensor(rows))


def test_two_stages_answer_with_the_token_after(folder: str) -> None:
    first, last = (load_shard(ShardSpec(folder, at, at + 1), TensorParallel()) for at in (0, 1))
    tokens = [FIRST_TOKEN, FIRST_TOKEN + TOKENS - 1, 40, 7]
    batch = batch_of(tokens, [0, 1, 3])
    batch.hidden = first.forward(batch)
    assert batch.hidden.shape == (4, 8)
    logits = last.forward(batch)
    assert logits.argmax(-1).tolist() == [next_token(tokens[row]) for row in (0, 1, 3)]
    assert next_token(FIRST_TOKEN + TOKENS - 1) == FIRST_TOKEN  # round again, within what is printable


def test_a_step_takes_its_time_and_drives_the_transports(folder: str) -> None:
    shard = load_shard(ShardSpec(folder, 0, 1), TensorParallel())
    driven: list[float] = []
    shard.on_layer = lambda: driven.append(time.monotonic())
    batch = batch_of([5], [0])
    took_s = []
    for _ in range(5):
        began = time.monotonic()
        shard.forward(batch)
        took_s.append(time.monotonic() - began)
    assert min(took_s) >= STEP_S
    # Slices that each slept a little too long would add up to more; the median, as the machine has other things to do.
    assert sorted(took_s)[2] < STEP_S * 1.25, took_s
    assert len(driven) >= 5 * 2


def test_only_one_rank_and_only_with_its_numbers(folder: str) -> None:
    with pytest.raises(ConfigError, match="one rank, not 2"):
        load_shard(ShardSpec(folder, 0, 1, tp_size=2), TensorParallel())
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": "stagemesh_sleep", "num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match="hidden_size"):
        load_shard(ShardSpec(folder, 0, 1), TensorParallel())


def test_it_needs_no_transformers(folder: str) -> None:
    code = (
        "import sys; from stagemesh.stage_worker.rank import process; "
        "from stagemesh.stage_worker.model import choose, spec; "
        f"choose.import_for(spec.ShardSpec({folder!r}, 0, 1)); "
        "print('transformers' in sys.modules, 'sleep_shard' in sys.modules)"
    )
    env = {**os.environ, **PLUGIN}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=env
    )
    assert done.stdout.split() == ["False", "True"]
