"""Decode steps as captured CUDA graphs: one launch instead of a few hundred.

A step of one-token rows is padded to a number of rows (and of pages per row) for which there is a graph. Its rows are
copied over the graph's inputs, and the graph is launched. Steps with prompts, and too large steps, run eagerly.

A graph is captured when a step first needs it. Before that, the step runs twice: once to complete all compilation and
allocation, once to check that nothing in it waits for the device. A model that does wait, as some mixtures of experts
do, is served without graphs.

Shapes: B rows of the step, padding included, T tokens, H hidden size, R rows that need logits, V vocabulary size.
"""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.tables import DecodeTables, pack_rows
from ...kv.pool import KvPool
from ..batch import StepBatch
from .fused import fuse_norms, fuse_rope
from .shard import ModelShard

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows for which graphs are captured."""
FIRST_WIDTH = 64
WIDTH_GROWTH = 4
"""Numbers of pages per row for which graphs are captured: 64, 256, 1024, ...; the last is the pool's size."""
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class PaddedRows:
    """A decode step prepared by `GraphedShard.prepare`."""

    key: tuple[int, int]
    """(rows, pages per row) of the graph."""
    host: Tensor
    """Result of `pack_rows`, [B, 1 + M] int32."""
    packed: Tensor
    """A copy of `host` on the device. The copy may still be under way."""


class GraphedShard:
    """A `ModelShard` whose decode steps are graphs. On a CPU they are padded in the same way and run eagerly."""

    def __init__(self, shard: ModelShard) -> None:
        """Fuses norms and rotary embedding of the shard's model, if possible."""
        self.on_layer: Callable[[], None] | None = None
        """Callback between layers of eager steps. A graph has no such points."""
        self.plain = shard
        """The shard that runs the steps that are not graphs."""
        self.kv_layout, self.kv_layers, self.cores = shard.kv_layout, shard.kv_layers, shard.cores
        self.hidden_size, self.vocab_size = shard.hidden_size, shard.vocab_size
        self.dtype, self.device = shard.dtype, shard.device
        self.weight_bytes, self.tensor_bytes_read = shard.weight_bytes, shard.tensor_bytes_read
        self.graphs: dict[tuple[int, int], Graph] = {}
        """(rows, pages per row) -> the step of this size, captured if the device can."""
        self.eager_because: str | None = None
        """The reason why no more graphs are captured, or None."""
        self._on_cuda = shard.device.type == "cuda"
        self._widths: list[int] = []
        self._page_size = 0
        self._memory: Any = None
        norms = fuse_norms(shard.model)
        ropes = fuse_rope(shard.model, shard.dtype, shard.device) if self._on_cuda else 0
        log.info("%d norms and the rotary embedding of %d model files are one kernel each", norms, ropes)

    def bind_kv(self, pool: KvPool) -> None:
        """Makes the shard use these pages from now on. Graphs over other pages are dropped."""
        self.graphs.clear()
        self._memory = None
        self.plain.bind_kv(pool)
        self._page_size = pool.page_size
        self._widths = page_widths(pool.num_pages)

    def prepare(self, batch: StepBatch) -> None:
        """Prepares a step before its activation arrives."""
        key = self._key(batch)
        if key is None:
            self.plain.prepare(batch)
            return
        host = pack_rows(batch.starts, batch.tables, batch.page_size, *key)
        batch.prepared = PaddedRows(key, host, host.to(self.device, non_blocking=True))

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """See `ModelShard.forward`. The caller owns the result."""
        self.plain.on_layer = self.on_layer
        with torch.cuda.device(self.device) if self._on_cuda else contextlib.nullcontext():
            if batch.prepared is None:
                self.prepare(batch)
            graph = self._graph(batch)
            return self.plain.forward(batch) if graph is None else graph.run(batch)

    def _key(self, batch: StepBatch) -> tuple[int, int] | None:
        """Returns the key of the graph that the step can be padded to, or None for an eager step."""
        count = len(batch.counts)
        if count > ROWS[-1] or any(tokens != 1 for tokens in batch.counts) or batch.page_size != self._page_size:
            return None
        rows = ROWS[bisect_left(ROWS, count)]
        at = bisect_left(self._widths, max(batch.starts) // batch.page_size + 1)
        if at == len(self._widths):
            return None
        key = rows, self._widths[at]
        return key if self.eager_because is None or key in self.graphs else None

    def _graph(self, batch: StepBatch) -> Graph | None:
        """Returns the step's graph, captured now if it is new, or None for an eager step."""
        rows = batch.prepared
        if not isinstance(rows, PaddedRows):
            return None
        graph = self.graphs.get(rows.key)
        if graph is not None:
            return graph
        if self.eager_because is None:
            graph = Graph(self.plain, *rows.key, self._page_size)
            if not self._on_cuda:
                self.graphs[rows.key] = graph
                return graph
            try:
                if self._memory is None:
                    self._memory = torch.cuda.graph_pool_handle()
                graph.load(batch, rows)
                graph.capture(self._memory, len(batch.counts))
            except RuntimeError as e:
                self.eager_because = f"{type(e).__name__}: {e}"
                log.warning("decode steps of %d rows and more kinds run without graphs: %s", rows.key[0], e)
            else:
                self.graphs[rows.key] = graph
                log.info("captured the decode step of %d rows and up to %d pages", *rows.key)
                return graph
        # The step was prepared for a graph that could not be captured.
        batch.prepared = None
        return None


class Graph:
    """The decode step of B rows: inputs that do not move, and the graph that is launched over them."""

    def __init__(self, shard: ModelShard, rows: int, width: int, page_size: int) -> None:
        device = shard.device
        self._shard = shard
        self._tables = DecodeTables(rows, width, page_size, device)
        self._inputs = StepBatch([], [], [], page_size, prepared=self._tables)
        """Inputs in memory that does not move."""
        if shard.is_first:
            self._inputs.token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        else:
            self._inputs.hidden = torch.zeros(rows, shard.hidden_size, dtype=shard.dtype, device=device)
        if shard.is_last:
            self._inputs.logit_rows = torch.arange(rows, device=device)
        self.captured: torch.cuda.CUDAGraph | None = None
        """The captured graph; None for an eager step."""
        self._out: Tensor | None = None

    def run(self, batch: StepBatch) -> Tensor:
        """Runs one step. Returns a copy of hidden states [T, H] or logits [R, V]: the next launch overwrites them."""
        assert isinstance(batch.prepared, PaddedRows)
        self.load(batch, batch.prepared)
        if self.captured is None:
            out = self._pass()
        else:
            self._shard.attention_backend.plan(self._tables)
            self.captured.replay()
            assert self._out is not None
            out = self._out
        if not self._shard.is_last:
            return out[: len(batch.counts)].clone()
        return out.index_select(0, batch.wanted_rows())

    def load(self, batch: StepBatch, rows: PaddedRows) -> None:
        """Replaces the rows of the last step by this step's. Padding rows keep tokens of earlier steps, which nothing
        reads."""
        self._tables.load(rows.host, rows.packed)
        given = batch.input_of(self._shard.is_first)
        kept = self._inputs.input_of(self._shard.is_first)
        kept[: given.shape[0]].copy_(given, non_blocking=True)

    def capture(self, memory: Any, rows: int) -> None:
        """Captures the step over the loaded rows, and compares one launch with the eager step.

        Raises:
            RuntimeError: the step waits for the device, cannot be captured, or its graph gives another result.
        """
        on_layer, self._shard.on_layer = self._shard.on_layer, None
        try:
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._pass()
                with _no_waiting():
                    expected = self._pass()[:rows].clone()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._out = self._pass()
        finally:
            self._shard.on_layer = on_layer
        self._shard.attention_backend.plan(self._tables)
        graph.replay()
        found, wanted = self._out[:rows].float().nan_to_num(), expected.float().nan_to_num()
        error, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
        if error > _TOLERANCES[self._shard.dtype] * max(scale, 1e-6):
            raise RuntimeError(f"a captured step of {rows} rows is {error:.3g} away from the step itself")
        self.captured = graph

    def _pass(self) -> Tensor:
        """Runs the step eagerly over the inputs."""
        self._tables.refresh()
        return self._shard.forward(self._inputs)


def page_widths(num_pages: int) -> list[int]:
    """Returns the numbers of pages per row for which graphs are captured, for a pool of `num_pages`."""
    widths = [min(FIRST_WIDTH, num_pages)]
    while widths[-1] < num_pages:
        widths.append(min(widths[-1] * WIDTH_GROWTH, num_pages))
    return widths


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes PyTorch raise an error whenever the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
