"""Layers that move by themselves (`--rebalance auto`): what measured steps advise for long enough becomes a wish."""

from __future__ import annotations

from ..world.world import World
from .plan import MeshPlan


def rebalance(world: World, plan: MeshPlan, now: float) -> None:
    """The ranges that have been better for some time, where nothing else changes."""
    if not world.settings.rebalance or world.wanted_ranges is not None:
        return
    if any(p.beside for p in world.pipelines.values()):
        return
    for pipeline in plan.kept(world):
        if pipeline.serving is not None and (ripe := pipeline.steps.ripe) is not None:
            plan.counts = tuple(last - first for first, last in ripe.ranges)
            return
