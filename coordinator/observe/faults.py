"""How attempts fail in the world. What follows from that is reconcile's business."""

from __future__ import annotations

from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.world import World


def interrupt(world: World, pipeline: Pipeline, reason: str, now: float, delay_s: float = 0.0) -> None:
    """The main attempt is over, whether it served or was being made. The next one may begin after `delay_s`."""
    if pipeline.main is None:
        return
    pipeline.main.fault = pipeline.reason = reason
    pipeline.retry_at = now + delay_s
    world.changed()
    world.publish()


def backoff_s(world: World, pipeline: Pipeline, now: float) -> float:
    """Counts a failure; how long to wait before the next attempt."""
    timing = world.timing
    if pipeline.serving is not None and now - pipeline.serving_since > timing.sound_s:
        pipeline.failures = 0
    pipeline.failures += 1
    return min(timing.retry_max_s, timing.retry_min_s * 2.0 ** min(pipeline.failures - 1, 10))


def fail_beside(world: World, attempt: Attempt, reason: str, now: float, *, blameless: bool = False) -> None:
    """The next epoch is not to be. Where gateways know of it already they may have switched, and will say so soon."""
    if attempt.fault:
        return
    attempt.fault, attempt.blameless = reason, blameless
    if attempt.phase is Phase.SWITCH:
        attempt.deadline = now + world.timing.verdict_s
    world.changed()
