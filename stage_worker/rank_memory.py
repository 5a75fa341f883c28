"""What a rank holds in memory: its shard of the model and the KV pages for it, kept while the next epoch wants both."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch

from stagemesh.errors import ConfigError
from stagemesh.protos.v1 import stage_pb2, types_pb2

from .config import RankConfig
from .control import Kind
from .engine import Engine
from .kv import KvPool
from .measure import available_memory_bytes
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
    """Loads the shard that an assignment asks for, and makes its pool of pages."""

    def __init__(self, config: RankConfig, engine: Engine, device: torch.device, parallel: TensorParallel) -> None:
        self.config = config
        self.engine = engine
        self.device = device
        self.parallel = parallel
        self._loaded: _Loaded | None = None
        self._pool: KvPool | None = None

    def shard_for(self, ident: int, request: stage_pb2.AssignRequest) -> Shard:
        """The shard, from memory or from disk; the agent is told of the progress of call `ident`.

        Raises:
            StagemeshError: the checkpoint or the settings do not allow it.
        """
        model = request.model
        spec = ShardSpec(
            model_dir=model.path,
            first=request.layers.first,
            last=request.layers.last,
            dtype=model.dtype or "auto",  # type: ignore[arg-type]
            device=str(self.device),
            tp_rank=self.config.rank,
            tp_size=self.config.size,
            load_format=model.load_format or "auto",  # type: ignore[arg-type]
            seed=model.seed,
            page_size=request.limits.page_size,
            threads=self.config.compute_threads,
            enforce_eager=self.config.enforce_eager,
        )
        if self._loaded is not None and (self._loaded.spec, self._loaded.fingerprint) == (spec, model.fingerprint):
            return self._loaded.shard
        # The old weights go first: both together may not fit.
        self._loaded = self._pool = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
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
        self._loaded = _Loaded(spec, model.fingerprint, shard)
        return shard

    def pool_for(self, shard: Shard, limits: types_pb2.RunLimits) -> KvPool:
        """The pages, shared by all gateways.

        Raises:
            ConfigError: not one request of --max-model-len would fit.
        """
        gateways = max(1, limits.gateways)
        pool = self._pool
        if (
            pool is not None
            and pool.page_size == limits.page_size
            and limits.num_pages in (0, pool.num_pages)
            and pool.num_pages // gateways * limits.page_size >= limits.max_model_len
        ):
            # Made for this shard from the memory there was; asked again, its own pages would count as taken.
            return pool
        self._pool = pool = None
        page_bytes = KvPool.page_bytes(shard.kv_layers, limits.page_size, shard.dtype)
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
        self._pool = KvPool(shard.kv_layers, pages, limits.page_size, shard.dtype, self.device)
        shard.bind_kv(self._pool)
        return self._pool

    def _kv_budget_bytes(self) -> int:
        if self.config.kv_cache_gib is not None:
            return int(self.config.kv_cache_gib * 2**30)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return max(0, int(total * self.config.gpu_memory_utilization) - (total - free))
        return int(available_memory_bytes() * CPU_KV_SHARE / self.config.size)
