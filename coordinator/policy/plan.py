"""What the policies want, put together: the mesh as it shall be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..values import Holders, Range, StagePlan
from ..world.pipeline import Attempt, Pipeline
from ..world.world import World


@dataclass(frozen=True)
class Goal:
    """What one pipeline shall be; without holders, why it cannot be anything."""

    policy: str
    holders: Holders = ()
    why: str = ""
    must: bool = False
    """Where it cannot be reached beside serving, the pipeline is formed anew; else it is left as it is."""
    takes_down: tuple[str, ...] = ()
    """Pipelines that give up their workers for it."""
    drops_counts: str = ""
    """Why the layer counts that are wanted cannot be kept for it."""
    final: bool = False
    """Without holders: waiting will not help."""


@dataclass
class MeshPlan:
    """Filled by the policies, in their order."""

    pipelines: list[str] = field(default_factory=list)
    """Pipelines that there shall be. Others leave."""
    goals: dict[str, Goal] = field(default_factory=dict)
    """Pipeline -> what it shall be. A pipeline without a goal stays as it is, or waits."""
    interrupts: set[str] = field(default_factory=set)
    """Pipelines that are to be formed anew though they serve: a gateway does not reach their workers."""
    drains: dict[str, str] = field(default_factory=dict)
    """Pipelines that take nothing new, and why."""
    loads: dict[str, Range] = field(default_factory=dict)
    """Worker -> layers that it shall load, to hold them later."""
    counts: tuple[int, ...] | None = None
    """Layers of each stage that shall be wanted from now on; None: as before."""
    drop_counts: str = ""
    """Why the layer counts that are wanted cannot be had; empty where they can."""

    def kept(self, world: World) -> list[Pipeline]:
        """Pipelines that are to stay."""
        return [p for p in world.kept if p.pipeline_id in self.pipelines]

    def unclaimed(self, world: World) -> Iterator[tuple[Pipeline, Attempt]]:
        """Pipelines that are to stay and serve, and of which nothing else is wanted yet, each with what serves."""
        for pipeline in self.kept(world):
            name, attempt = pipeline.pipeline_id, pipeline.serving
            if attempt is not None and name not in self.goals and name not in self.drains:
                yield pipeline, attempt

    def others(self, world: World, pipeline: Pipeline) -> list[Sequence[StagePlan]]:
        """The stages of each of the other pipelines that are to stay, as they are going to be."""
        return [(p.beside or p).stages for p in self.kept(world) if p is not pipeline]

    def taken(self, pipeline_id: str) -> frozenset[str]:
        """Workers that are promised to other pipelines by this plan."""
        others = (goal for name, goal in self.goals.items() if name != pipeline_id)
        return frozenset(holder.worker_id for goal in others for holder in goal.holders)
