"""The limits of a pipeline, from settings and the description of a checkpoint. Pure."""

from __future__ import annotations

import math

from stagemesh.errors import ConfigError
from stagemesh.models.size import CheckpointInfo
from stagemesh.protos.v1.types_pb2 import RunLimits
from stagemesh.settings.model import ModelSettings

from .cost import CostModel, Kind
from .partition import even_ranges
from .steps import HOP_S, best_steps

DEFAULT_MAX_MODEL_LEN = 4096
STEP_S = 1e-3
"""Seconds that a stage needs for a step of any model besides reading weights and computing."""
NOMINAL = Kind(1, 0, flops_per_s=math.inf, bytes_per_s=1e10)
"""A rank of which nothing is known: one core of a server, whose decode steps are bound by memory."""


def run_limits(
    settings: ModelSettings, info: CheckpointInfo, *, steps_in_flight: int = 0, gateways: int = 1
) -> RunLimits:
    """Returns the limits. Raises ConfigError if they contradict the model or each other."""
    longest = info.max_position_embeddings
    wanted = settings.max_model_len
    if wanted is not None and wanted > longest:
        raise ConfigError(
            f"--max-model-len {wanted} is above the {longest} positions that the model was made for "
            f"(max_position_embeddings and rotary scaling in config.json): use --max-model-len {longest} or less"
        )
    limits = RunLimits(
        max_model_len=wanted or min(longest, DEFAULT_MAX_MODEL_LEN),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        page_size=settings.block_size,
        num_pages=settings.num_kv_pages or 0,
        steps_in_flight=steps_in_flight,
        gateways=gateways,
    )
    held, need = limits.num_pages * limits.page_size, pages_per_sequence(limits)
    if 0 < limits.num_pages < need:
        raise ConfigError(
            f"--num-kv-pages {limits.num_pages} of {limits.page_size} tokens hold {held} tokens, one sequence of "
            f"--max-model-len {limits.max_model_len} needs {need} pages: use --num-kv-pages {need} or "
            f"--max-model-len {held}"
        )
    return limits


def pages_per_sequence(limits: RunLimits) -> int:
    """KV pages that a sequence of `max_model_len` tokens needs."""
    return -(-limits.max_model_len // limits.page_size)


def default_steps(info: CheckpointInfo, limits: RunLimits, dtype: str, num_stages: int) -> int:
    """The number of steps in flight for a pipeline whose workers are not known yet: one per stage, or one more.

    Fewer than one per stage would leave stages idle, and more than one in addition has no time to fill.
    """
    cost = CostModel(info, limits, dtype)
    ranges = even_ranges(info.num_layers, num_stages)

    def seconds(rows: int) -> list[float]:
        return [STEP_S + cost.stage_seconds(NOMINAL, *layers, rows) for layers in ranges]

    return best_steps(seconds, limits.max_num_seqs, (num_stages, num_stages + 1), HOP_S)
