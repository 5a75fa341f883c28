"""A stage that sleeps for a given time instead of computing, to measure everything around compute.

It is a plugin of ranks (`STAGEMESH_PLUGINS=sleep_shard`, stage_worker/model/choose.py), for folders whose config.json
has its model type. The config has the seconds of a step (`step_seconds`), and optionally the additional seconds of each
row of a step for each layer (`row_seconds`). There are no weights, so the coordinator needs `--load-format dummy`. All
the rest is real: plans, pages, links, sampling. While such a stage sleeps, the processor is free for others, as with an
accelerator. The transports are driven between slices, as between layers. It imports neither transformers nor any
kernel, so dozens of stages fit on a small machine.

The tokens are predictable: the activation's first column carries the token through all stages, and the last stage
answers with the next one. So a lost or swapped activation is visible in the text.

Shapes: T tokens in the step, R rows that need logits, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stagemesh.errors import ConfigError, InternalError
from stagemesh.stage_worker.kv.pool import KvLayerSpec, KvPool
from stagemesh.stage_worker.model.batch import StepBatch, lay_out
from stagemesh.stage_worker.model.choose import register_shard
from stagemesh.stage_worker.model.spec import ShardSpec

MODEL_TYPE = "stagemesh_sleep"
SLICES = 4
"""Largest number of slices per step. No slice is shorter than `SHORTEST_SLICE_S`, because each wakes the process for
70 us of CPU. A real stage's compute would hide that. Here, neighbours on the same cores would wait for it."""
SHORTEST_SLICE_S = 2.5e-3
FIRST_TOKEN, TOKENS = 4, 94
"""Tokens count up through this range and begin again. A byte-level vocabulary has the printable ASCII there."""
PR_SET_TIMERSLACK = 29

_DTYPES = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def next_token(token: int) -> int:
    """Returns the model's answer to `token`."""
    return FIRST_TOKEN + (token - FIRST_TOKEN + 1) % TOKENS


class SleepShard:
    """A shard of the layers [first, last) of a model that sleeps, in place of a `ModelShard`."""

    on_layer: Callable[[], None] | None = None
    """Callback between slices of the sleep, in which the caller can drive its transports."""
    cores = (1, 1)
    kv_layout = "nothing"
    """Name of the layout within a page; see `Shard`."""

    def __init__(self, spec: ShardSpec) -> None:
        """Raises ConfigError if config.json lacks a number, or for more than one rank per stage."""
        if spec.tp_size > 1:
            raise ConfigError(f"a stage that sleeps has one rank, not {spec.tp_size}: use -tp 1")
        config = json.loads((Path(spec.model_dir) / "config.json").read_bytes())
        try:
            self.num_layers = int(config["num_hidden_layers"])
            self.hidden_size = int(config["hidden_size"])
            self.vocab_size = int(config["vocab_size"])
            self.sleep_s = float(config["step_seconds"])
            each = [float(seconds) for seconds in config.get("row_seconds", [0.0] * self.num_layers)]
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{spec.model_dir}/config.json: a model that sleeps needs the number {e}") from e
        self.first, self.last = spec.first, spec.last
        self.row_s = sum(each[spec.first : spec.last])
        self.is_first = spec.first == 0
        self.is_last = spec.last == self.num_layers
        self.dtype = _DTYPES[spec.dtype]
        self.device = torch.device(spec.device)
        self.weight_bytes = self.tensor_bytes_read = 0
        self.kv_layers = [KvLayerSpec(layer, 1, 1, 1) for layer in range(spec.first, spec.last)]
        _wake_on_time()

    def bind_kv(self, pool: KvPool) -> None:
        """Does nothing: pages are allocated and never written."""

    def prepare(self, batch: StepBatch) -> None:
        """Lays out the rows, because a real stage has that cost, too."""
        batch.prepared = lay_out(batch)

    def forward(self, batch: StepBatch) -> Tensor:
        """Sleeps. Returns hidden states [T, H], or logits [R, V] in fp32 on the last stage."""
        wake_at = time.monotonic() + self.sleep_s + self.row_s * sum(batch.counts)
        hidden = batch.hidden if not self.is_first else self._embed(batch)
        if hidden is None:
            raise InternalError("a stage after the first needs hidden states")
        # A link's buffer is released when the step is over, so the output is a copy.
        output = self._logits(hidden, batch) if self.is_last else hidden.clone()
        self._sleep_until(wake_at)
        return output

    def _sleep_until(self, wake_at: float) -> None:
        """Sleeps until an absolute time, so that the slices' own costs do not add up."""
        slice_s = max(SHORTEST_SLICE_S, self.sleep_s / SLICES)
        while (left_s := wake_at - time.monotonic()) > slice_s:
            time.sleep(slice_s)
            if self.on_layer is not None:
                self.on_layer()
        time.sleep(max(0.0, left_s))

    def _embed(self, batch: StepBatch) -> Tensor:
        if batch.token_ids is None:
            raise InternalError("the first stage needs token ids")
        hidden = torch.zeros(len(batch.token_ids), self.hidden_size, dtype=self.dtype, device=self.device)
        hidden[:, 0] = (batch.token_ids - FIRST_TOKEN) % TOKENS
        return hidden

    def _logits(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        if batch.logit_rows is None:
            raise InternalError("the last stage needs to know whose logits are wanted")
        answers = FIRST_TOKEN + (hidden[batch.logit_rows, 0].long() + 1) % TOKENS
        logits = torch.zeros(len(answers), self.vocab_size, device=self.device)
        logits[torch.arange(len(answers)), answers] = 1.0
        return logits


def _wake_on_time() -> None:
    """Removes 50 us of slack from this thread's timers. They would be a sixtieth of a step of 3 ms."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


register_shard(MODEL_TYPE, SleepShard)
