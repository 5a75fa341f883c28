"""Loads shards of the model and allocates their KV pages. Keeps both while later epochs may need them."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable

import torch

from stagemesh.errors import ConfigError
from stagemesh.processes.limits import available_memory_bytes
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.settings.stage import CPU_KV_SHARE

from ...kv.journal import Journal
from ...kv.memory import trim_heap
from ...kv.page_ranges import PageRanges
from ...kv.pool import KvPool
from ...messages.rank_config import RankConfig
from ...model.choose import Shard, load_shard
from ...model.parallel import TensorParallel
from ...model.spec import ShardSpec
from ...sampling.drafter import Drafter
from ..engine import Engine
from .resources import StageResources, page_share

Request = stage_pb2.AssignRequest | stage_pb2.PrepareRequest
Progress = Callable[[int, int], None]


class RankMemory:
    """Loads the shards of assignments and allocates their pages.

    Usually it holds one set of resources, and keeps it over epochs with the same layers. While the worker's layers
    change during serving, it holds two sets. The second shares the weights and pages of common layers with the first.
    """

    def __init__(self, config: RankConfig, engine: Engine, device: torch.device, parallel: TensorParallel) -> None:
        self.config = config
        self.engine = engine
        self.device = device
        self.parallel = parallel
        self._residents: list[StageResources] = []
        """Resources in memory, in the order of use, the newest last."""

    def hold(self, request: Request, tell: Progress) -> StageResources:
        """Returns the shard, the pages, and on rank 0 of the last stage the draft model.

        Resources in memory that fit the request are used again. Otherwise unused resources are freed before the load,
        because both may not fit. `tell(done, total)` counts bytes of weights.

        Raises:
            StagemeshError: the checkpoint, the settings or the memory do not allow it.
        """
        resources = self.find(request)
        if resources is None:
            resources = self.make(request, self.load(request, tell))
        return resources

    def find(self, request: Request) -> StageResources | None:
        """Returns resources in memory that fit the request, or None."""
        wanted = self._wanted(request)
        found = next((r for r in self._residents if r.wanted == wanted and self._fits(r, request.limits)), None)
        if found is None:
            return None
        self._residents.remove(found)
        self._residents.append(found)
        self.trim()
        return found

    def load(self, request: Request, tell: Progress) -> list[Shard]:
        """Loads the shards of a request: the model's, then the draft model's. It may run on any thread.

        Layers of a shard in memory are shared with it, not loaded again.
        """
        wanted = self._wanted(request)
        serving = self._serving()
        before = serving.shard if serving is not None else None
        if before is None and self._residents and self.device.type == "cpu":
            # Unused resources are freed, except layers that are needed again. On a GPU their pages would take room.
            before = self._residents[-1].shard
        self.trim(keep_one=False)
        drafters = [r.drafter.shard for r in self._residents if r.drafter and r.wanted[1:] == wanted[1:]]
        shards = [load_shard(wanted[0][0], self.parallel, tell, before)]
        for spec, _ in wanted[1:]:
            shards.append(drafters[0] if drafters else load_shard(spec, self.parallel, tell))
        for shard in shards:
            shard.on_layer = self.engine.drive_transports
        trim_heap()  # A load leaves free memory there, such as that of dummy weights in fp32.
        return shards

    def make(self, request: Request, shards: list[Shard]) -> StageResources:
        """Makes pages and journal for loaded shards. Raises ConfigError if not even one request would fit."""
        limits, shard = request.limits, shards[0]
        before = self._serving() or next(
            (resources for resources in self._in_use() if self._fits(resources, limits)), None
        )
        if before is not None and not self._fits(before, limits):
            raise ConfigError("the worker serves with other bounds, which cannot change while it serves")
        if before is None:
            pages = self._num_pages(limits, shards)
            pool = KvPool(shard.kv_layers, pages, limits.page_size, shard.dtype, self.device)
            ranges = PageRanges(pages, _nonce)
        else:
            # A layer has the same pages for every assignment, so a pipeline that changes assignments finds its pages.
            pools = [resources.pool for resources in self._in_use()]
            self._check_room(pools, shards)
            pool = KvPool(shard.kv_layers, before.pool.num_pages, limits.page_size, shard.dtype, self.device, pools)
            ranges = before.ranges
        shard.bind_kv(pool)
        drafter = None
        if len(shards) > 1:
            known = before.drafter if before is not None else None
            drafter = known if known is not None and known.shard is shards[1] else Drafter(shards[1], pool)
        journal = None
        if request.layers.last < request.model.num_layers:
            boundary = request.layers.last - 1
            same = (resources for resources in self._in_use() if resources.shard.kv_layers[-1].layer_idx == boundary)
            other = next(same, None) if before is not None else None
            journal = other.journal if other is not None else self._make_journal(pool, shard)
        resources = StageResources(shard, pool, drafter, ranges, journal, _nonce(), self._wanted(request))
        self._residents.append(resources)
        return resources

    def _serving(self) -> StageResources | None:
        """Returns the resources of the newest active assignment. New layers are loaded beside them."""
        active = [assignment for assignment in self.engine.assignments.values() if assignment.active]
        return max(active, key=lambda assignment: assignment.epoch).resources if active else None

    def _in_use(self) -> list[StageResources]:
        """Returns the resources of all assignments, each once."""
        return list({id(a.resources): a.resources for a in self.engine.assignments.values()}.values())

    def trim(self, *, keep_one: bool = True) -> None:
        """Frees resources without an assignment. `keep_one` keeps the newest resources."""
        used = {id(assignment.resources) for assignment in self.engine.assignments.values()}
        kept = [r for r in self._residents if id(r) in used or (keep_one and r is self._residents[-1])]
        if len(kept) == len(self._residents):
            return
        self._residents = kept
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wanted(self, request: Request) -> list[tuple[ShardSpec, str]]:
        """Returns the value of `StageResources.wanted` for a request."""
        limits, model = request.limits, request.model
        wanted = [(self._spec(model, limits, (request.layers.first, request.layers.last)), model.fingerprint)]
        if model.HasField("draft") and request.layers.last == model.num_layers and self.config.rank == 0:
            theirs = model.draft.model
            wanted.append((self._spec(theirs, limits, (0, theirs.num_layers), whole=True), theirs.fingerprint))
        return wanted

    @staticmethod
    def _fits(resources: StageResources, limits: types_pb2.RunLimits) -> bool:
        """Whether the pages fit the limits. If the limits give no number of pages, any number fits."""
        return (
            resources.pool.page_size == limits.page_size
            and limits.num_pages in (0, resources.pool.num_pages)
            and page_share(resources.pool.num_pages, limits) * limits.page_size >= limits.max_model_len
        )

    def _spec(
        self, model: types_pb2.ModelRef, limits: types_pb2.RunLimits, layers: tuple[int, int], *, whole: bool = False
    ) -> ShardSpec:
        """Describes this rank's part of the layers. `whole`: all of each layer, not a rank's share."""
        return ShardSpec(
            model_dir=model.path,
            first=layers[0],
            last=layers[1],
            dtype=model.dtype or "auto",  # type: ignore[arg-type]
            device=str(self.device),
            tp_rank=0 if whole else self.config.rank,
            tp_size=1 if whole else self.config.size,
            load_format=model.load_format or "auto",  # type: ignore[arg-type]
            quantization=model.quantization,  # type: ignore[arg-type]
            seed=model.seed,
            deterministic=model.deterministic,
            page_size=limits.page_size,
            threads=self.config.compute_threads,
            idle_cores=() if whole else tuple(self.config.idle_cpus),
            enforce_eager=self.config.settings.enforce_eager,
        )

    def _num_pages(self, limits: types_pb2.RunLimits, shards: list[Shard]) -> int:
        """Returns the number of pages for all gateways. Raises ConfigError if --max-model-len tokens would not fit."""
        shares = max(1, limits.gateways) * max(1, limits.pipelines)
        page_bytes = sum(KvPool.page_bytes(s.kv_layers, limits.page_size, s.dtype) for s in shards)
        one_sequence = -(-limits.max_model_len // limits.page_size)
        budget = self._kv_budget_bytes()
        pages = limits.num_pages or min(one_sequence * limits.max_num_seqs * shares, budget // page_bytes)
        if pages // shares < one_sequence:
            raise ConfigError(
                f"one request of --max-model-len {limits.max_model_len} needs {one_sequence} KV pages of {page_bytes} "
                f"bytes here, and there are {pages} for {shares} gateway(s) and pipeline(s): lower --max-model-len to "
                f"{pages // shares * limits.page_size}, or raise --num-kv-pages / --kv-cache-gib (now "
                f"{budget / 2**30:.2f} GiB)"
            )
        return pages

    def _check_room(self, pools: list[KvPool], shards: list[Shard]) -> None:
        """Raises ConfigError when the pages of new layers do not fit beside those in memory."""
        pool = pools[0]
        new = [layer for layer in shards[0].kv_layers if not any(layer in other.layers for other in pools)]
        need = KvPool.page_bytes(new, pool.page_size, pool.dtype) * pool.num_pages
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else self._available_bytes()
        if need > free:
            raise ConfigError(
                f"{len(new)} more layers need {need / 2**30:.2f} GiB for {pool.num_pages} KV pages beside what runs, "
                f"and {free / 2**30:.2f} GiB are free: move fewer layers, or start with fewer pages (--num-kv-pages)"
            )

    def _make_journal(self, pool: KvPool, shard: Shard) -> Journal | None:
        """Makes a journal of the size --journal-gib. Returns None if not even one page fits."""
        page_bytes = Journal.page_bytes(pool.page_size, shard.hidden_size, shard.dtype)
        pages = min(pool.num_pages, int(self.config.settings.journal_gib * 2**30) // page_bytes)
        return Journal(pages, pool.page_size, shard.hidden_size, shard.dtype) if pages else None

    def _kv_budget_bytes(self) -> int:
        if self.config.settings.kv_cache_gib is not None:
            return int(self.config.settings.kv_cache_gib * 2**30)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return max(0, int(total * self.config.settings.gpu_memory_utilization) - (total - free))
        return int(self._available_bytes() * CPU_KV_SHARE)

    def _available_bytes(self) -> int:
        """Returns this rank's share of the memory that is free on a CPU."""
        return available_memory_bytes() // self.config.size


def _nonce() -> int:
    return secrets.randbits(63) | 1
