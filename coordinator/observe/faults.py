"""Marks attempts as failed. Reconcile decides what follows."""

from __future__ import annotations

from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.world import World


def fail(
    world: World, attempt: Attempt, reason: str, now: float, *, pause: bool = False, blameless: bool = False
) -> None:
    """Marks an attempt as failed, whether it served or was being made.

    `pause`: the next attempt waits, longer with each failure in a row. `blameless`: does not count as a failed move. A
    move that gateways know of waits up to `verdict_s` for their reports: some may have switched already.
    """
    if attempt.beside:
        if not attempt.fault:
            attempt.fault, attempt.blameless = reason, blameless
            if attempt.phase is Phase.SWITCH:
                attempt.deadline = now + world.timing.verdict_s
            world.changed()
        return
    pipeline = world.pipelines[attempt.pipeline_id]
    pipeline.retry_at = now + (_backoff_s(world, pipeline, now) if pause else 0.0)
    attempt.fault = pipeline.reason = reason
    world.publish()


def _backoff_s(world: World, pipeline: Pipeline, now: float) -> float:
    """Counts a failure. Returns the seconds to wait before the next attempt."""
    timing = world.timing
    if pipeline.serving is not None and now - pipeline.serving_since > timing.sound_s:
        pipeline.failures = 0
    pipeline.failures += 1
    return min(timing.retry_max_s, timing.retry_min_s * 2.0 ** min(pipeline.failures - 1, 10))
