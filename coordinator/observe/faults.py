"""How attempts fail in the world. What follows from that is reconcile's business."""

from __future__ import annotations

from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.world import World


def fail(
    world: World, attempt: Attempt, reason: str, now: float, *, pause: bool = False, blameless: bool = False
) -> None:
    """An attempt is over, whether it served or was being made.

    `pause`: the next one waits, longer with each failure in a row. `blameless`: it says nothing of the next try. Beside
    one that serves, an attempt is not to be: where gateways know of it they may have switched, and will say so soon.
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
    """Counts a failure; how long to wait before the next attempt."""
    timing = world.timing
    if pipeline.serving is not None and now - pipeline.serving_since > timing.sound_s:
        pipeline.failures = 0
    pipeline.failures += 1
    return min(timing.retry_max_s, timing.retry_min_s * 2.0 ** min(pipeline.failures - 1, 10))
