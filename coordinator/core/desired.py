"""The desired mesh: an ordered list of policies, called one after the other. Pure."""

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
"""Reads the world and the plan so far, and adds to the plan. The number is the clock time."""

POLICIES: tuple[Policy, ...] = (
    # The set of pipelines comes first: the other policies plan for each of them.
    count_pipelines,
    # A pipeline that a gateway cannot drive is formed again: no other policy helps it.
    reach,
    # Before the other moves: a pipeline with too few stages can have neither other ranges nor replicas.
    give_back,
    # An operator waits for a worker that drains, perhaps with a deadline.
    drain,
    # Before `ranges`, which carries out what `rebalance` asks for.
    rebalance,
    # An operator's requests, the cheaper one first: ranges keep the workers, shares may not.
    ranges,
    share,
    # Pipelines that do not serve are placed when the needs of serving ones are known.
    form,
    # The other workers take over layers only if nothing can be formed.
    take_over,
    # The rest can wait: a standby is freed, ...
    release,
    # ... and spare workers load copies. Last, so that no worker is taken that another policy needs.
    warm,
)


def desired(world: World, now: float) -> MeshPlan:
    """The plan of all policies for the world at clock time `now`."""
    plan = MeshPlan()
    for policy in POLICIES:
        policy(world, plan, now)
    return plan
