"""Workers that were started for one stage, and the standbys that took their place."""

from __future__ import annotations

import pytest
from mesh_world import TIMING, Story, drain, introduction, scale, target
from test_scaling import serving, settle, stages

from stagemesh.coordinator import values as v
from stagemesh.coordinator.core.moves import TRIES
from stagemesh.coordinator.policy.standby import copies
from stagemesh.coordinator.world.worker import Worker
from stagemesh.protocol import MOVES
from stagemesh.protos.v1.stage_pb2 import AssignRequest


def two(*, any_stage: bool) -> Story:
    """Two stages on workers that were started for them, a standby, and a gateway."""
    story = Story()
    story.gateway()
    for pool, name in enumerate("ab"):
        story.join(name, pool, any_stage=any_stage)
    story.join("spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"]}
    return story


def lose(story: Story, name: str, pool: int, *, any_stage: bool) -> None:
    story.lose(name)
    settle(story)
    story.join(name, pool, any_stage=any_stage)
    settle(story)


def test_a_standby_is_free_again_soon_after_the_lost_worker_is_back() -> None:
    story = two(any_stage=False)
    lose(story, "a", 0, any_stage=False)
    assert stages(story) == {"pipeline-0": ["spare", "b"]}
    story.wait(TIMING.settled_s - 0.2, "a", "b", "spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["spare", "b"]}, "what was lost is computed again"
    story.took(AssignRequest)
    story.wait(0.5, "a", "b", "spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"]}
    assert serving(story)
    assert all(a.request.beside for a in story.took(AssignRequest)), "while it served"
    story.lose("b")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "spare"]}, "one stage changes hands"


def test_it_stays_where_another_could_take_any_stage() -> None:
    story = two(any_stage=False)
    story.join("other")
    lose(story, "a", 0, any_stage=False)
    holders = stages(story)
    assert holders["pipeline-0"][0] != "a"
    story.wait(TIMING.settled_s + 5, "a", "b", "spare", "other")
    settle(story)
    assert stages(story) == holders


@pytest.mark.parametrize("other", ["ranks", "protocol"])
def test_it_stays_where_its_pages_could_not_be_copied(other: str) -> None:
    """Serving goes before the next loss."""
    story = Story()
    story.gateway()
    story.join("a", 0), story.join("b", 1), story.join("spare")
    settle(story)
    story.lose("a")
    settle(story)
    changes = {"tp": 2} if other == "ranks" else {"protocol": MOVES - 1}
    story.join("a", 0, **changes)
    settle(story)
    story.took(AssignRequest)
    story.wait(TIMING.settled_s + 150, "a", "b", "spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["spare", "b"]}
    assert not story.took(AssignRequest)


def test_moves_that_fail_are_not_tried_for_ever() -> None:
    story = two(any_stage=False)
    lose(story, "a", 0, any_stage=False)
    story.took(AssignRequest)
    for _ in range(200):
        settle(story, layouts={"a": "another"})
        story.wait(1, "a", "b", "spare")
    assert stages(story) == {"pipeline-0": ["spare", "b"]}
    assert len(story.took(AssignRequest)) == 2 * TRIES


def test_one_that_never_held_the_stage_does_not_take_it() -> None:
    """It may be slower, and smaller."""
    story = Story()
    story.gateway()
    story.join("x"), story.join("y")
    settle(story)
    story.join("late", 0, bytes_per_s=1e8)
    story.wait(TIMING.settled_s + 5, "x", "y", "late")
    settle(story)
    assert stages(story) == {"pipeline-0": ["x", "y"]}


def test_it_stays_while_somebody_drains() -> None:
    story = two(any_stage=False)
    lose(story, "a", 0, any_stage=False)
    story.join("late", 1)
    story.send(drain("late"))
    story.wait(TIMING.settled_s + 5, "a", "b", "spare", "late")
    settle(story)
    assert stages(story) == {"pipeline-0": ["spare", "b"]}


@pytest.mark.parametrize(("any_stage", "then"), [(True, ["spare", "a"]), (False, ["a", "spare"])])
def test_one_that_may_stand_in_for_any_stage_does(any_stage: bool, then: list[str]) -> None:
    """Else two stages change hands: the standby goes from the one to the other."""
    story = two(any_stage=any_stage)
    lose(story, "a", 0, any_stage=any_stage)
    assert stages(story) == {"pipeline-0": ["spare", "b"]}
    story.lose("b")
    settle(story)
    assert stages(story) == {"pipeline-0": then}
    assert serving(story)


def test_a_replica_is_made_of_whoever_is_left() -> None:
    story = Story()
    story.gateway()
    for name, pool in (("a", 0), ("a2", 0), ("b", 1)):
        story.join(name, pool, any_stage=True)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b"]}
    story.lose("b")
    settle(story)
    story.join("b", 1, any_stage=True)
    for _ in range(20):
        settle(story)
        story.wait(1, *story.world.workers)
    assert len(stages(story)) == 2
    assert serving(story)


def test_layers_that_others_took_over_go_back_to_where_they_were() -> None:
    story = Story(target(3, takeover_s=1.0))
    story.gateway()
    for pool, name in enumerate("abc"):
        story.join(name, pool, any_stage=True)
    settle(story)
    story.lose("b")
    story.wait(2, "a", "c")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "c"]}
    story.join("b", 1, any_stage=True)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b", "c"]}


def test_what_is_kept_ready_is_its_own_stage_first() -> None:
    plans = [v.StagePlan(0, "x", 1, (0, 3), 1), v.StagePlan(1, "y", 1, (3, 6), 1)]
    standbys = [Worker(introduction(name, pool=pool, any_stage=True), 0.0) for name, pool in (("b", 1), ("a", 0))]
    assert copies(plans, standbys) == {"b": (3, 6), "a": (0, 3)}


def test_its_own_stage_comes_first() -> None:
    story = two(any_stage=True)
    lose(story, "a", 0, any_stage=True)
    story.lose("spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"]}


def test_it_keeps_the_stage_that_it_stands_in_for() -> None:
    story = two(any_stage=True)
    lose(story, "a", 0, any_stage=True)
    lose(story, "b", 1, any_stage=True)
    assert stages(story) == {"pipeline-0": ["spare", "a"]}
    story.wait(10, "a", "b", "spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["spare", "a"]}
    story.lose("spare")
    settle(story)
    assert stages(story) == {"pipeline-0": ["b", "a"]}


def test_a_replica_of_another_stage_than_its_own_can_be_asked_for() -> None:
    story = two(any_stage=True)
    lose(story, "b", 1, any_stage=True)
    assert stages(story) == {"pipeline-0": ["a", "spare"]}
    assert story.check_scale(0, 2) == 2
    story.send(scale(0, 2))
    for _ in range(5):
        settle(story)
        story.wait(1, *story.world.workers)
    assert [len({names[s] for names in stages(story).values()}) for s in (0, 1)] == [2, 1]
    assert serving(story)
