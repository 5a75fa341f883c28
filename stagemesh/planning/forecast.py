"""What a mesh of given workers would be: who holds which layers, how many sequences fit, how fast steps can be. Pure.

Times are lower bounds: weights and KV are read, and products computed, at the rates of the workers' kinds. Links, and
what goes on around a step, take more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError
from stagemesh.models.bits import LOADED, with_bits
from stagemesh.models.size import ELEMENT_BYTES, CheckpointInfo
from stagemesh.settings.plan import PlanSettings
from stagemesh.settings.stage import CPU_KV_SHARE

from .cost import CostModel, Kind
from .devices import Device
from .limits import default_steps, pages_per_sequence, run_limits
from .partition import GIB, Range, check_counts, partition
from .steps import tokens_per_s

QUANTIZATIONS = ("int8", "int4")
"""Tried when a model does not fit. fp8 takes as many bits as int8."""


class DoesNotFit(Exception):
    """The model does not fit the workers. The text says how much is missing, and what would fit."""


@dataclass(frozen=True)
class StageForecast:
    """One stage. Bytes and tokens are those of one rank; all ranks of a stage are alike."""

    stage: int
    worker: str
    tensor_parallel_size: int
    first_layer: int
    last_layer: int
    """The last layer that it holds."""
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    """Tokens that its pages hold."""
    row_s: float
    """Seconds of a decode step with one row of a short sequence."""
    full_step_s: float
    """Seconds of a decode step with `rows` rows, each of half of `max_model_len` tokens."""


@dataclass(frozen=True)
class Forecast:
    """A mesh that fits."""

    layers: int
    parameters: int
    dtype: str
    max_model_len: int
    stages: tuple[StageForecast, ...]
    sequences: int
    """Number of sequences of `max_model_len` tokens that run at once."""
    max_num_seqs: int
    """Largest number of sequences that may run at once, whatever their length."""
    steps_in_flight: int
    rows: int
    """Rows of a decode step when that many sequences run."""
    bottleneck: int
    """The stage with the slowest full step."""
    tokens_per_s: float
    """Most tokens per second of that many sequences."""
    tokens_per_s_alone: float
    """Most tokens per second of a single short sequence."""


def forecast(info: CheckpointInfo, settings: PlanSettings, devices: Sequence[Device]) -> Forecast:
    """Returns what the coordinator and workers with these devices would make of a model.

    Raises:
        ConfigError: the settings contradict the model or each other.
        DoesNotFit: the model does not fit.
    """
    check_counts(info.num_layers, len(devices), settings.layer_partition)
    info = _quantized(info, settings.quantization)
    cost = _cost(info, settings)
    workers = [
        _kind(device, size, settings.gpu_memory_utilization)
        for device, size in zip(devices, settings.tp_sizes, strict=True)
    ]
    try:
        ranges = partition(cost, workers, settings.layer_partition)
    except ConfigError as e:
        more = f"{_missing_bytes(cost, workers, settings.layer_partition) / GIB:.2f} GiB more on each rank"
        raise DoesNotFit("; ".join([f"needs {more}: {e.message}", *_others(info, settings, devices)])) from None
    pages = [
        _num_pages(cost, stage, *of_stage, settings.kv_cache_gib)
        for stage, of_stage in enumerate(zip(devices, workers, ranges, strict=True))
    ]
    return _told(cost, devices, workers, ranges, pages)


def _quantized(info: CheckpointInfo, method: str | None) -> CheckpointInfo:
    """The model with weights in the bits of --quantization. Raises ConfigError if the checkpoint is quantized."""
    if method is None:
        return info
    if _is_quantized(info):
        raise ConfigError(f"--quantization {method}: the checkpoint is quantized already; leave the option out")
    return replace(info, layers=tuple(with_bits(info.layers, LOADED[method])))


def _is_quantized(info: CheckpointInfo) -> bool:
    return any(part.bits is not None or part.expert_bits is not None for part in info.layers)


def _cost(info: CheckpointInfo, settings: PlanSettings) -> CostModel:
    dtype = info.dtype if settings.dtype == "auto" else settings.dtype
    limits = run_limits(settings, info)
    limits.steps_in_flight = settings.steps_in_flight or default_steps(
        info, limits, dtype, settings.pipeline_parallel_size
    )
    return CostModel(
        info, limits, dtype, kv_element_bytes=ELEMENT_BYTES[dtype] if settings.kv_cache_dtype == "auto" else 1
    )


def _kind(device: Device, ranks: int, utilization: float) -> Kind:
    memory = device.memory_gib * GIB * (1.0 if device.is_cpu else utilization)
    own = int(memory / (ranks if device.is_cpu else 1))
    return Kind(ranks, own, device.flops_per_s, device.bytes_per_s, keeps_latents=device.is_cpu)


def _fits(cost: CostModel, workers: Sequence[Kind], counts: Sequence[int] | None) -> bool:
    try:
        partition(cost, workers, counts)
    except ConfigError:
        return False
    return True


def _missing_bytes(cost: CostModel, workers: Sequence[Kind], counts: Sequence[int] | None) -> float:
    """The least memory that each rank needs in addition. It is at most a hundredth of a GiB too much."""
    low, high = 0.0, sum(float(cost.memory(kind)[-1]) for kind in workers) + cost.fixed_memory()
    while high - low > GIB / 100:
        middle = (low + high) / 2
        roomier = [replace(kind, memory_bytes=int(kind.memory_bytes + middle)) for kind in workers]
        low, high = (low, middle) if _fits(cost, roomier, counts) else (middle, high)
    return high


def _others(info: CheckpointInfo, settings: PlanSettings, devices: Sequence[Device]) -> Iterator[str]:
    """What else would fit: weights of fewer bits, or more ranks."""

    def would_fit(info: CheckpointInfo, sizes: Sequence[int]) -> bool:
        kinds = [_kind(*each, settings.gpu_memory_utilization) for each in zip(devices, sizes, strict=True)]
        return _fits(_cost(info, settings), kinds, settings.layer_partition)

    if not _is_quantized(info):
        yield from (
            f"--quantization {method} would fit"
            for method in QUANTIZATIONS
            if would_fit(_quantized(info, method), settings.tp_sizes)
        )
    for factor in (2, 4, 8):
        sizes = [
            size * (1 if device.is_cpu else factor) for size, device in zip(settings.tp_sizes, devices, strict=True)
        ]
        if would_fit(info, sizes):
            yield f"-tp {','.join(map(str, sizes))} would fit"
            return


def _num_pages(
    cost: CostModel, stage: int, device: Device, kind: Kind, layers: Range, kv_cache_gib: float | None
) -> int:
    """KV pages of a stage's rank, by the rules of the worker. Raises DoesNotFit if not even one sequence has room."""
    limits = cost.limits
    page_bytes = cost.kv_bytes_per_token(kind) * (layers[1] - layers[0]) * limits.page_size
    free = kind.memory_bytes - cost.stage_weights(kind, *layers) - cost.fixed_memory()
    budget = free * CPU_KV_SHARE if device.is_cpu else free
    if kv_cache_gib is not None:
        budget = kv_cache_gib * GIB
    need = pages_per_sequence(limits)
    pages = limits.num_pages or min(need * limits.max_num_seqs, int(budget // page_bytes))
    if pages < need:
        raise DoesNotFit(
            f"stage {stage} ({device.name}) needs {need * page_bytes / GIB:.2f} GiB for the KV of one sequence of "
            f"{limits.max_model_len} tokens, and has {budget / GIB:.2f} GiB: --max-model-len "
            f"{pages * limits.page_size} or --kv-cache-gib {need * page_bytes / GIB:.2f} would fit"
        )
    return pages


def _told(
    cost: CostModel, devices: Sequence[Device], workers: Sequence[Kind], ranges: Sequence[Range], pages: Sequence[int]
) -> Forecast:
    limits, context = cost.limits, cost.limits.max_model_len / 2
    sequences = min(limits.max_num_seqs, min(pages) // pages_per_sequence(limits))
    rows = -(-sequences // limits.steps_in_flight)

    def seconds(rows: int, context: float = context) -> list[float]:
        return [cost.stage_seconds(kind, *layers, rows, context) for kind, layers in zip(workers, ranges, strict=True)]

    full = seconds(rows)
    stages = [
        StageForecast(
            stage=stage,
            worker=f"{device.name} {device.memory_gib:g} GiB",
            tensor_parallel_size=kind.tp_size,
            first_layer=first,
            last_layer=last - 1,
            weight_bytes=int(cost.stage_weights(kind, first, last)),
            kv_bytes_per_token=cost.kv_bytes_per_token(kind) * (last - first),
            kv_tokens=pages[stage] * limits.page_size,
            row_s=seconds(1, 0)[stage],
            full_step_s=full[stage],
        )
        for stage, (device, kind, (first, last)) in enumerate(zip(devices, workers, ranges, strict=True))
    ]
    return Forecast(
        layers=cost.info.num_layers,
        parameters=cost.info.total_parameters,
        dtype=cost.dtype,
        max_model_len=limits.max_model_len,
        stages=tuple(stages),
        sequences=sequences,
        max_num_seqs=limits.max_num_seqs,
        steps_in_flight=limits.steps_in_flight,
        rows=rows,
        bottleneck=max(range(len(full)), key=full.__getitem__),
        tokens_per_s=tokens_per_s(seconds, sequences, limits.steps_in_flight),
        tokens_per_s_alone=1 / sum(seconds(1, 0)),
    )
