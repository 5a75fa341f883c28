"""Workers that were started for one stage, and the standbys that took their place."""

from __future__ import annotations

import pytest
from mesh_world import World, target
from test_scaling import serving, settle, stages

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.moving import TRIES
from stagemesh.coordinator.scaling import SETTLED_S
from stagemesh.coordinator.warming import copies
from stagemesh.protocol import MOVES


def two(*, any_stage: bool) -> World:
    """Two stages on workers that were started for them, a standby, and a gateway."""
    world = World()
    world.gateway()
    for pool, name in enumerate("ab"):
        world.join(name, pool, any_stage=any_stage)
    world.join("spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"]}
    return world


def lose(world: World, name: str, pool: int, *, any_stage: bool) -> None:
    world.lose(name)
    settle(world)
    world.join(name, pool, any_stage=any_stage)
    settle(world)


def test_a_standby_is_free_again_soon_after_the_lost_worker_is_back() -> None:
    world = two(any_stage=False)
    lose(world, "a", 0, any_stage=False)
    assert stages(world) == {"pipeline-0": ["spare", "b"]}
    world.wait(SETTLED_S - 0.2, "a", "b", "spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["spare", "b"]}, "what was lost is computed again"
    world.took(actions.Assign)
    world.wait(0.5, "a", "b", "spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"]}
    assert serving(world)
    assert all(a.beside for a in world.took(actions.Assign)), "while it served"
    world.lose("b")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "spare"]}, "one stage changes hands"


def test_it_stays_where_another_could_take_any_stage() -> None:
    world = two(any_stage=False)
    world.join("other")
    lose(world, "a", 0, any_stage=False)
    holders = stages(world)
    assert holders["pipeline-0"][0] != "a"
    world.wait(SETTLED_S + 5, "a", "b", "spare", "other")
    settle(world)
    assert stages(world) == holders


@pytest.mark.parametrize("other", ["ranks", "protocol"])
def test_it_stays_where_its_pages_could_not_be_copied(other: str) -> None:
    """Serving goes before the next loss."""
    world = World()
    world.gateway()
    world.join("a", 0), world.join("b", 1), world.join("spare")
    settle(world)
    world.lose("a")
    settle(world)
    changes = {"tp": 2} if other == "ranks" else {"protocol": MOVES - 1}
    world.join("a", 0, **changes)
    settle(world)
    world.took(actions.Assign)
    world.wait(SETTLED_S + 150, "a", "b", "spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["spare", "b"]}
    assert not world.took(actions.Assign)


def test_moves_that_fail_are_not_tried_for_ever() -> None:
    world = two(any_stage=False)
    lose(world, "a", 0, any_stage=False)
    world.took(actions.Assign)
    for _ in range(200):
        settle(world, layouts={"a": "another"})
        world.wait(1, "a", "b", "spare")
    assert stages(world) == {"pipeline-0": ["spare", "b"]}
    assert len(world.took(actions.Assign)) == 2 * TRIES


def test_one_that_never_held_the_stage_does_not_take_it() -> None:
    """It may be slower, and smaller."""
    world = World()
    world.gateway()
    world.join("x"), world.join("y")
    settle(world)
    world.join("late", 0, bytes_per_s=1e8)
    world.wait(SETTLED_S + 5, "x", "y", "late")
    settle(world)
    assert stages(world) == {"pipeline-0": ["x", "y"]}


def test_it_stays_while_somebody_drains() -> None:
    world = two(any_stage=False)
    lose(world, "a", 0, any_stage=False)
    world.join("late", 1)
    world.mesh.workers["late"].draining = True
    world.wait(SETTLED_S + 5, "a", "b", "spare", "late")
    settle(world)
    assert stages(world) == {"pipeline-0": ["spare", "b"]}


@pytest.mark.parametrize(("any_stage", "then"), [(True, ["spare", "a"]), (False, ["a", "spare"])])
def test_one_that_may_stand_in_for_any_stage_does(any_stage: bool, then: list[str]) -> None:
    """Else two stages change hands: the standby goes from the one to the other."""
    world = two(any_stage=any_stage)
    lose(world, "a", 0, any_stage=any_stage)
    assert stages(world) == {"pipeline-0": ["spare", "b"]}
    world.lose("b")
    settle(world)
    assert stages(world) == {"pipeline-0": then}
    assert serving(world)


def test_a_replica_is_made_of_whoever_is_left() -> None:
    world = World()
    world.gateway()
    for name, pool in (("a", 0), ("a2", 0), ("b", 1)):
        world.join(name, pool, any_stage=True)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b"]}
    world.lose("b")
    settle(world)
    world.join("b", 1, any_stage=True)
    for _ in range(20):
        settle(world)
        world.wait(1, *world.mesh.workers)
    assert len(stages(world)) == 2
    assert serving(world)


def test_layers_that_others_took_over_go_back_to_where_they_were() -> None:
    world = World(target(3, takeover_s=1.0))
    world.gateway()
    for pool, name in enumerate("abc"):
        world.join(name, pool, any_stage=True)
    settle(world)
    world.lose("b")
    world.wait(2, "a", "c")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "c"]}
    world.join("b", 1, any_stage=True)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b", "c"]}


def test_what_is_kept_ready_is_its_own_stage_first() -> None:
    plans = [v.StagePlan(0, "x", 1, (0, 3), 1), v.StagePlan(1, "y", 1, (3, 6), 1)]
    standbys = [
        v.Worker(v.WorkerInfo(name, 1, f"{name}:1", pool, any_stage=True), 0.0) for name, pool in (("b", 1), ("a", 0))
    ]
    assert copies(plans, standbys) == {"b": (3, 6), "a": (0, 3)}


def test_its_own_stage_comes_first() -> None:
    world = two(any_stage=True)
    lose(world, "a", 0, any_stage=True)
    world.lose("spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"]}


def test_it_keeps_the_stage_that_it_stands_in_for() -> None:
    world = two(any_stage=True)
    lose(world, "a", 0, any_stage=True)
    lose(world, "b", 1, any_stage=True)
    assert stages(world) == {"pipeline-0": ["spare", "a"]}
    world.wait(10, "a", "b", "spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["spare", "a"]}
    world.lose("spare")
    settle(world)
    assert stages(world) == {"pipeline-0": ["b", "a"]}


def test_a_replica_of_another_stage_than_its_own_can_be_asked_for() -> None:
    world = two(any_stage=True)
    lose(world, "b", 1, any_stage=True)
    assert stages(world) == {"pipeline-0": ["a", "spare"]}
    assert world.mesh.check_scale(0, 2) == 2
    world.send(events.ScaleRequested(0, 2))
    for _ in range(5):
        settle(world)
        world.wait(1, *world.mesh.workers)
    assert [len({names[s] for names in stages(world).values()}) for s in (0, 1)] == [2, 1]
    assert serving(world)
