"""Cuts the layers into contiguous ranges, one per stage, so that the slowest stage is as fast as possible.

Dynamic programming over (stage, cut), as in PipeDream (Narayanan et al., 2019) without its replication: with best[s][j]
the shortest possible time of the slowest stage when the first s workers hold layers [0, j),
best[s][j] = min over i < j of max(best[s-1][i], seconds of layers [i, j) on worker s), without ranges that do not fit.
A second pass of the same form, bounded by that optimum, minimises the sum of squares: the most even of the best cuts.
Both run over all cuts of a stage at once: 400 layers on 400 stages take a fraction of a second.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from stagemesh.errors import ConfigError

from .cost import CostModel, FloatArray, Kind

GIB = float(1 << 30)
Range = tuple[int, int]
"""Decoder layers [first, last)."""


def check_counts(num_layers: int, num_stages: int, layer_partition: Sequence[int] | None) -> None:
    """Raises ConfigError when `num_stages` stages, or the given counts, cannot cover the layers exactly once."""
    if num_stages > num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {num_stages} is above the model's {num_layers} layers: a stage needs at least "
            f"one; use -pp {num_layers} or less"
        )
    if layer_partition is None:
        return
    counts = list(layer_partition)
    even = ",".join(str(last - first) for first, last in even_ranges(num_layers, num_stages))
    shown = ",".join(map(str, counts))
    if len(counts) != num_stages:
        raise ConfigError(
            f"--layer-partition {shown} names {len(counts)} stages, --pipeline-parallel-size is {num_stages}: "
            f"give {num_stages} counts, such as {even}, or use -pp {len(counts)}"
        )
    if min(counts) < 1:
        raise ConfigError(
            f"--layer-partition {shown} gives stage {counts.index(min(counts))} {min(counts)} layers: "
            f"each stage needs at least one, such as {even}"
        )
    if sum(counts) != num_layers:
        gap = num_layers - sum(counts)
        wrong = f"{gap} layers would be held by nobody" if gap > 0 else f"{-gap} more than there are"
        raise ConfigError(
            f"--layer-partition {shown} adds up to {sum(counts)} layers, the model has {num_layers} ({wrong}): "
            f"use counts that add up, such as {even}"
        )


def even_ranges(num_layers: int, num_stages: int) -> list[Range]:
    """Ranges whose layer counts differ by at most one, the longer ones first."""
    base, extra = divmod(num_layers, num_stages)
    cuts = [0]
    for stage in range(num_stages):
        cuts.append(cuts[-1] + base + (stage < extra))
    return list(itertools.pairwise(cuts))


def partition(model: CostModel, workers: Sequence[Kind], layer_partition: Sequence[int] | None = None) -> list[Range]:
    """The range of each worker, in stage order.

    Raises ConfigError if they do not fit, with the numbers and the smallest change that would.
    """
    num_layers = model.info.num_layers
    check_counts(num_layers, len(workers), layer_partition)
    if layer_partition is not None:
        cuts = [0, *np.cumsum(np.array(layer_partition)).tolist()]
        ranges = list(itertools.pairwise(cuts))
        for stage, (kind, (first, last)) in enumerate(zip(workers, ranges, strict=True)):
            if not model.fits(kind, first, last):
                raise ConfigError(
                    f"stage {stage} (layers {first}-{last - 1}) needs {_gib(model.stage_memory(kind, first, last))} a "
                    f"rank, its worker has {_gib(kind.memory_bytes)}: {_smallest_change(model, workers)}"
                )
        return ranges
    found = _best_cuts(model, workers)
    if found is None:
        largest = max(workers, key=lambda kind: kind.memory_bytes)
        need = model.memory(largest)[-1] + model.fixed_memory() * len(workers)
        have = sum(kind.memory_bytes for kind in workers)
        raise ConfigError(
            f"the model does not fit {len(workers)} stages: with KV for one sequence of {model.limits.max_model_len} "
            f"tokens it needs {_gib(need)} a rank over all stages, the workers have {_gib(have)}: "
            f"{_smallest_change(model, workers)}"
        )
    return found


def _best_cuts(model: CostModel, workers: Sequence[Kind]) -> list[Range] | None:
    """The most even of the cuts whose slowest stage is fastest. None when nothing fits."""
    num_layers = model.info.num_layers
    tables: dict[Kind, FloatArray] = {}
    """Seconds [L+1, L+1] of layers [i, j). Infinite where j <= i, and where the layers do not fit."""
    for kind in set(workers):
        seconds, memory = model.seconds(kind), model.memory(kind)
        tables[kind] = seconds[None, :] - seconds[:, None]
        tables[kind][np.tri(num_layers + 1, dtype=bool)] = np.inf
        if kind.memory_bytes:
            needs = memory[None, :] - memory[:, None] + model.fixed_memory()
            tables[kind][needs > kind.memory_bytes] = np.inf
    best = np.full(num_layers + 1, np.inf)
    best[0] = 0.0
    for kind in workers:
        best = np.maximum(best[:, None], tables[kind]).min(axis=0)
    slowest = best[-1]
    if not np.isfinite(slowest):
        return None
    bound = slowest * (1 + 1e-9)
    squares = {kind: np.where(table <= bound, np.square(table), np.inf) for kind, table in tables.items()}
    total = np.full(num_layers + 1, np.inf)
    total[0] = 0.0
    came_from = []
    for kind in workers:
        candidates = total[:, None] + squares[kind]
        choice = candidates.argmin(axis=0)
        came_from.append(choice)
        total = candidates[choice, np.arange(num_layers + 1)]
    cuts = [num_layers]
    for choice in reversed(came_from):
        cuts.append(int(choice[cuts[-1]]))
    cuts.reverse()
    return list(itertools.pairwise(cuts))


def _smallest_change(model: CostModel, workers: Sequence[Kind]) -> str:
    """What would make the model fit: more stages, a smaller --max-model-len, or more memory."""
    options = []
    longest = _longest_that_fits(model, workers)
    if longest:
        options.append(f"--max-model-len {longest} would fit")
    roomiest = max(workers, key=lambda kind: kind.memory_bytes)
    counts = range(len(workers) + 1, model.info.num_layers + 1)
    at = bisect.bisect_left(
        counts, True, key=lambda stages: _fits_greedily(model, [*workers, *[roomiest] * (stages - len(workers))])
    )
    if at < len(counts):
        options.append(f"it needs {counts[at]} stages of such workers (-pp {counts[at]})")
    if not options:
        return (
            f"not even one layer a stage fits ({_gib(np.diff(model.memory(roomiest)).max())} for the largest); "
            "use workers with more memory, or more ranks a stage (-tp)"
        )
    return "; or ".join(options) + "; or use workers with more memory"


def _fits_greedily(model: CostModel, workers: Sequence[Kind], max_model_len: int | None = None) -> bool:
    """Whether some cut fits: each worker in turn takes as many layers as it can hold (exact for memory alone)."""
    num_layers, first = model.info.num_layers, 0
    memory = {kind: model.memory(kind, max_model_len) for kind in set(workers)}
    for index, kind in enumerate(workers):
        last = num_layers - (len(workers) - index - 1)
        if kind.memory_bytes:
            room = memory[kind][first] + kind.memory_bytes - model.fixed_memory()
            last = min(last, int(np.searchsorted(memory[kind], room, side="right")) - 1)
        if last <= first:
            return False
        first = last
    return first == num_layers


def _longest_that_fits(model: CostModel, workers: Sequence[Kind]) -> int:
    """The longest --max-model-len, in tokens of whole pages, at which the model fits. 0 if none does."""
    if model.limits.num_pages:
        return 0  # The operator set the number of pages.
    page = model.limits.page_size
    counts = range(1, model.limits.max_model_len // page + 1)
    return page * bisect.bisect_left(counts, True, key=lambda n: not _fits_greedily(model, workers, n * page))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
