"""The plan that the policies fill: how the mesh should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..values import Holders, Range, StagePlan
from ..world.pipeline import Attempt, Pipeline
from ..world.world import World


@dataclass(frozen=True)
class Goal:
    """The workers and layers that one pipeline should have. Without holders, `why` says why there are none."""

    policy: str
    holders: Holders = ()
    why: str = ""
    must: bool = False
    """If moves fail: True forms the pipeline again, which interrupts it; False leaves it as it is."""
    takes_down: tuple[str, ...] = ()
    """Pipelines whose workers this goal takes."""
    drops_counts: str = ""
    """Why this goal cannot use the wanted layer counts. Empty if it can."""
    final: bool = False
    """Without holders: True if waiting will not help."""


@dataclass
class MeshPlan:
    """The plan of one pass. Policies fill it in their order."""

    pipelines: list[str] = field(default_factory=list)
    """Pipelines that should exist. All others leave."""
    goals: dict[str, Goal] = field(default_factory=dict)
    """Pipeline -> its goal. A pipeline without a goal stays as it is, or waits."""
    interrupts: set[str] = field(default_factory=set)
    """Pipelines to form again though they serve, because a gateway does not reach their workers."""
    drains: dict[str, str] = field(default_factory=dict)
    """Pipeline that takes no new requests -> why."""
    loads: dict[str, Range] = field(default_factory=dict)
    """Worker -> layers to load now and hold later."""
    counts: tuple[int, ...] | None = None
    """New wanted layer counts per stage. None: no change."""
    drop_counts: str = ""
    """Why the wanted layer counts are dropped. Empty if they are not."""

    def kept(self, world: World) -> list[Pipeline]:
        """Existing pipelines that stay."""
        return [p for p in world.kept if p.pipeline_id in self.pipelines]

    def unclaimed(self, world: World) -> Iterator[tuple[Pipeline, Attempt]]:
        """Serving pipelines that stay and that no policy has claimed yet, each with its serving attempt."""
        for pipeline in self.kept(world):
            name, attempt = pipeline.pipeline_id, pipeline.serving
            if attempt is not None and name not in self.goals and name not in self.drains:
                yield pipeline, attempt

    def others(self, world: World, pipeline: Pipeline) -> list[Sequence[StagePlan]]:
        """The stages of each other pipeline that stays, after its current move."""
        return [(p.beside or p).stages for p in self.kept(world) if p is not pipeline]

    def taken(self, pipeline_id: str) -> frozenset[str]:
        """Workers that this plan promises to other pipelines."""
        others = (goal for name, goal in self.goals.items() if name != pipeline_id)
        return frozenset(holder.worker_id for goal in others for holder in goal.holders)
