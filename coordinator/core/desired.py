"""The mesh as it shall be: an ordered list of policies, asked one after the other. Pure."""

from __future__ import annotations

from collections.abc import Callable

from ..policy.drain import drain
from ..policy.form import form
from ..policy.plan import MeshPlan
from ..policy.ranges import ranges
from ..policy.reach import reach
from ..policy.rebalance import rebalance
from ..policy.replicas import count_pipelines, share
from ..policy.standby import release, warm
from ..policy.takeover import give_back, take_over
from ..world.world import World

Policy = Callable[[World, MeshPlan, float], None]
"""Reads the world and the plan so far, and adds to the plan; the number is the clock time."""

POLICIES: tuple[Policy, ...] = (
    # First, which pipelines there shall be: the others speak of each.
    count_pipelines,
    # A pipeline that a gateway cannot drive is formed anew: nothing else can be done with it.
    reach,
    # Before what changes pipelines beside serving: one of fewer stages can have neither other ranges nor replicas.
    give_back,
    # A worker that drains has somebody waiting for it, and may have a deadline.
    drain,
    # What was measured becomes a wish before wishes are looked at.
    rebalance,
    # What an operator asked for, in the order in which it costs less: ranges keep the workers, shares may not.
    ranges,
    share,
    # What does not serve is placed when it is known what those that serve need.
    form,
    # Only where nothing can be formed do the others take layers over.
    take_over,
    # What can wait: a standby is freed, ...
    release,
    # ... and who is left over loads copies. Last, so that nobody is taken whom another policy needs.
    warm,
)


def desired(world: World, now: float) -> MeshPlan:
    """What the policies want of the world as it is at clock time `now`."""
    plan = MeshPlan()
    for policy in POLICIES:
        policy(world, plan, now)
    return plan
