"""A pipeline in one process: shards called one after the other, chunked prefill, then batched decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import Shard, load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec

PAGE_SIZE = 16


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence in a step; `wanted`: the last one's logits are."""

    tokens: list[int]
    start: int
    table: list[int]
    wanted: bool


class Chain:
    """Stages split at `bounds` (0, ..., number of layers), their KV pools, and one greedy decoder over them."""

    def __init__(
        self,
        model_dir: str | Path,
        bounds: Sequence[int],
        *,
        dtype: str = "float32",
        device: str = "cpu",
        num_pages: int = 256,
        parallel: TensorParallel | None = None,
        load_format: str = "auto",
        enforce_eager: bool = False,
        deterministic: bool = False,
        quantization: str = "",
        threads: int = 1,
        idle_cores: tuple[int, ...] = (),
    ) -> None:
        """`idle_cores`: used by all steps."""
        self.device = device
        self.alone = bool(idle_cores)
        self.shards: list[Shard] = []
        parallel = parallel or TensorParallel()
        for first, last in pairwise(bounds):
            spec = ShardSpec(
                str(model_dir),
                first,
                last,
                dtype,  # type: ignore[arg-type]
                device,
                parallel.rank,
                parallel.size,
                load_format,  # type: ignore[arg-type]
                page_size=PAGE_SIZE,
                enforce_eager=enforce_eager,
                deterministic=deterministic,
                quantization=quantization,  # type: ignore[arg-type]
                threads=threads,
                idle_cores=idle_cores,
            )
            self.shards.append(load_shard(spec, parallel))
        self.pools = [KvPool(shard.kv_layers, num_pages, PAGE_SIZE, shard.dtype, shard.device) for shard in self.shards]
        for shard, pool in zip(self.shards, self.pools, strict=True):
            shard.bind_kv(pool)
        self._parallel = parallel

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [R, V] of the wanted rows."""
        ends = torch.tensor([len(row.tokens) for row in rows]).cumsum(0) - 1
        wanted = ends[torch.tensor([row.wanted for row in rows])].to(self.device)
        tokens = torch.tensor([token for row in rows for token in row.tokens], device=self.device)
        out: torch.Tensor | None = None
        for shard in self.shards:
            batch = StepBatch(
                [row.start for row in rows],
                [len(row.tokens) for row in rows],
                [row.table for row in rows],
                PAGE_SIZE,
                token_ids=tokens,
                hidden=out,
                logit_rows=wanted,
                alone=self.alone,
            )
            shard.prepare(batch)
            out = shard.forward(batch)
        assert out is not None
        return out

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, chunk: int = 47, forget: bool = False
    ) -> list[list[int]]:
        """Greedy tokens of every prompt: prefilled in chunks one after the other, then decoded as one batch.

        `forget` zeroes the KV between prefill and decode, and between chunks.
        """
        tables, free = [], 0
        for prompt in prompts:
            count = -(-(len(prompt) + max_tokens) // PAGE_SIZE)
            tables.append(list(range(free, free + count))[::-1])
            free += count
        out: list[list[int]] = []
        for prompt, table in zip(prompts, tables, strict=True):
            logits = torch.empty(0)
            for start in range(0, len(prompt), chunk):
                piece = list(prompt[start : start + chunk])
                logits = self.step([Row(piece, start, table, start + chunk >= len(prompt))])
                if forget:
                    self.zero_kv()
            out.append([self._pick(logits)[0]])
        while len(out[0]) < max_tokens:
            rows = [
                Row([done[-1]], len(prompt) + len(done) - 1, table, True)
                for prompt, done, table in zip(prompts, out, tables, strict=True)
            ]
            for done, token in zip(out, self._pick(self.step(rows)), strict=True):
                done.append(token)
            if forget:
                self.zero_kv()
        return out

    def zero_kv(self) -> None:
        """Forget every key and value."""
        for pool in self.pools:
            pool.zero()

    def _pick(self, logits: torch.Tensor) -> list[int]:
        if self._parallel.size == 1:
            return [int(token) for token in logits.argmax(-1)]
        chosen = torch.zeros(logits.shape[0], dtype=torch.int64, device=self.device)
        if self._parallel.rank == 0:
            chosen = logits.argmax(-1)
        return [int(token) for token in self._parallel.group().all_reduce(chosen)]
