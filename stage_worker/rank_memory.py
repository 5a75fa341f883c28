"""What a rank holds in memory: its shard of the model and the KV pages for it, kept while the next epoch wants both."""

from __future__ import annotations

import gc
import secrets
import time
from dataclasses import dataclass

import torch

from stagemesh.errors import ConfigError
from stagemesh.protos.v1 import stage_pb2, types_pb2

from .assignment import Held
from .config import RankConfig
from .control import Kind
from .drafter import Drafter
from .engine import Engine
from .journal import Journal
from .kv import KvPool
from .measure import available_memory_bytes
from .page_ranges import PageRanges
from .parallel import TensorParallel
from .shard.choose import Shard, load_shard
from .shard.spec import ShardSpec

CPU_KV_SHARE = 0.25


@dataclass(frozen=True)
class _Loaded:
    """The shard in memory and what it was loaded as; kept over epochs that want the same."""

    spec: ShardSpec
    fingerprint: str
    shard: Shard


class RankMemory:
    """Loads what an assignment asks for, and makes the pages."""

    def __init__(self, config: RankConfig, engine: Engine, device: torch.device, parallel: TensorParallel) -> None:
        self.config = config
        self.engine = engine
        self.device = device
        self.parallel = parallel
        self._loaded: _Loaded | None = None
        self._draft: _Loaded | None = None
        self._pool: KvPool | None = None
        self._drafter: Drafter | None = None
        self._ranges = PageRanges(1, _nonce)
        self._journal: Journal | None = None

    def hold(self, ident: int, request: stage_pb2.AssignRequest | stage_pb2.PrepareRequest) -> Held:
        """Shard, pages, and on rank 0 of the last stage the draft model; the agent is told of the progress of `ident`.

        What is in memory and fits the request stays; everything else goes first, as both together may not fit.

        Raises:
            StagemeshError: the checkpoint, the settings or the memory do not allow it.
        """
        limits, model = request.limits, request.model
        spec = self._spec(model, limits, (request.layers.first, request.layers.last))
        draft = None
        if model.HasField("draft") and request.layers.last == model.num_layers and self.config.rank == 0:
            draft = self._spec(model.draft.model, limits, (0, model.draft.model.num_layers), whole=True)
        same = _is(self._loaded, spec, model.fingerprint) and _is(self._draft, draft, model.draft.model.fingerprint)
        if not same:
            # All of it: a shard keeps the pages that it was given, and the next ones are made of what memory is left.
            self._loaded = self._draft = self._drafter = self._pool = self._journal = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if self._loaded is None:
            self._loaded = _Loaded(spec, model.fingerprint, self._load(spec, ident))
        if self._draft is None and draft is not None:
            self._draft = _Loaded(draft, model.draft.model.fingerprint, self._load(draft, ident))
        pool = self._pages(limits)
        if self._journal is None and request.layers.last < model.num_layers:
            self._journal = self._make_journal(pool, self._loaded.shard)
        return Held(self._loaded.shard, pool, self._drafter, self._ranges, self._journal)

    def _spec(
        self, model: types_pb2.ModelRef, limits: types_pb2.RunLimits, layers: tuple[int, int], *, whole: bool = False
    ) -> ShardSpec:
        """This rank's part of the layers; `whole`: all of each, not its share among the ranks."""
        return ShardSpec(
            model_dir=model.path,
            first=layers[0],
            last=layers[1],
            dtype=model.dtype or "auto",  # type: ignore[arg-type]
            device=str(self.device),
            tp_rank=0 if whole else self.config.rank,
            tp_size=1 if whole else self.config.size,
            load_format=model.load_format or "auto",  # type: ignore[arg-type]
            seed=model.seed,
            deterministic=model.deterministic,
            page_size=limits.page_size,
            threads=self.config.compute_threads,
            idle_cores=() if whole else tuple(self.config.idle_cpus),
            enforce_eager=self.config.enforce_eager,
        )

    def _load(self, spec: ShardSpec, ident: int) -> Shard:
        last_told = 0.0

        def on_progress(done: int, total: int) -> None:
            nonlocal last_told
            now = time.monotonic()
            if now - last_told > 0.05 or done == total:
                last_told = now
                progress = stage_pb2.AssignResponse(loaded_bytes=done, total_bytes=total)
                self.engine.control.send(Kind.PROGRESS, ident, progress.SerializeToString())

        shard = load_shard(spec, self.parallel, on_progress)
        shard.on_layer = self.engine.drive_transports
        return shard

    def _pages(self, limits: types_pb2.RunLimits) -> KvPool:
        """The pages, shared by all gateways. Raises ConfigError when not one request of --max-model-len would fit."""
        gateways = max(1, limits.gateways)
        pool = self._pool
        if (
            pool is not None
            and pool.page_size == limits.page_size
            and limits.num_pages in (0, pool.num_pages)
            and self._ranges.count == gateways
            and pool.num_pages // gateways * limits.page_size >= limits.max_model_len
        ):
            # Made for these shards from the memory there was; asked again, its own pages would count as taken.
            return pool
        self._pool = self._drafter = self._journal = pool = None
        shards = [loaded.shard for loaded in (self._loaded, self._draft) if loaded is not None]
        page_bytes = sum(KvPool.page_bytes(s.kv_layers, limits.page_size, s.dtype) for s in shards)
        one_sequence = -(-limits.max_model_len // limits.page_size)
        budget = self._kv_budget_bytes()
        pages = limits.num_pages or min(one_sequence * limits.max_num_seqs * gateways, budget // page_bytes)
        if pages // gateways < one_sequence:
            raise ConfigError(
                f"one request of --max-model-len {limits.max_model_len} needs {one_sequence} KV pages of {page_bytes} "
                f"bytes here, and there are {pages} for {gateways} gateway(s): lower --max-model-len to "
                f"{pages // gateways * limits.page_size}, or raise --num-kv-pages / --kv-cache-gib (now "
                f"{budget / 2**30:.2f} GiB)"
            )
        shard = shards[0]
        pool = KvPool(shard.kv_layers, pages, limits.page_size, shard.dtype, self.device)
        shard.bind_kv(pool)
        self._drafter = Drafter(shards[1], pool) if len(shards) > 1 else None
        self._pool = pool
        self._ranges = PageRanges(gateways, _nonce)
        return pool

    def _make_journal(self, pool: KvPool, shard: Shard) -> Journal | None:
        """As much of it as --journal-gib allows; nothing where that is not one page."""
        page_bytes = Journal.page_bytes(pool.page_size, shard.hidden_size, shard.dtype)
        pages = min(pool.num_pages, int(self.config.journal_gib * 2**30) // page_bytes)
        return Journal(pages, pool.page_size, shard.hidden_size, shard.dtype) if pages else None

    def _kv_budget_bytes(self) -> int:
        if self.config.kv_cache_gib is not None:
            return int(self.config.kv_cache_gib * 2**30)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return max(0, int(total * self.config.gpu_memory_utilization) - (total - free))
        return int(available_memory_bytes() * CPU_KV_SHARE / self.config.size)


def _nonce() -> int:
    return secrets.randbits(63) | 1


def _is(loaded: _Loaded | None, spec: ShardSpec | None, fingerprint: str) -> bool:
    """Whether what is loaded is what is wanted; nothing, where nothing is."""
    if loaded is None or spec is None:
        return loaded is None and spec is None
    return (loaded.spec, loaded.fingerprint) == (spec, fingerprint)
