"""Fewer workers than stages: the others take the layers over, and give them back."""

from __future__ import annotations

from mesh_world import LAYERS, World, target
from test_scaling import serving, settle, stages

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.cost import Kind
from stagemesh.coordinator.pipeline import State

TAKEOVER_S = 5.0


def three() -> World:
    """Three stages that serve, on workers that are bound to them, and a gateway."""
    made = World(target(3, takeover_s=TAKEOVER_S))
    made.gateway()
    for pool, name in enumerate("abc"):
        made.join(name, pool)
    settle(made)
    assert stages(made) == {"pipeline-0": ["a", "b", "c"]}
    return made


def ranges(world: World) -> list[v.Range]:
    return [plan.layers for plan in world.mesh.pipelines["pipeline-0"].stages]


def test_the_others_take_over_what_nobody_else_does() -> None:
    world = three()
    world.lose("b")
    settle(world)
    world.wait(TAKEOVER_S - 1, "a", "c")
    assert world.state is State.DOWN, "it may come back"
    world.wait(1.5, "a", "c")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "c"]}
    assert serving(world)
    assert ranges(world) == [(0, 3), (3, LAYERS)]


def test_one_is_enough_if_it_has_the_memory() -> None:
    world = three()
    world.lose("a")
    world.lose("c")
    settle(world)
    world.wait(TAKEOVER_S + 1, "b")
    settle(world)
    assert stages(world) == {"pipeline-0": ["b"]}
    assert ranges(world) == [(0, LAYERS)]


def test_memory_that_does_not_suffice_leaves_it_down() -> None:
    world = World(target(2, takeover_s=TAKEOVER_S))
    world.gateway()
    cost, kind = world.mesh.target.cost, Kind(1, 0, 1e11, 1e10)
    first, last, whole = (cost.stage_memory(kind, *layers) for layers in ((0, 3), (3, 6), (0, 6)))
    for pool, name in enumerate("ab"):
        world.join(name, pool, memory_bytes=int(max(first, last) + whole) // 2)
    settle(world)
    assert serving(world)
    world.lose("b")
    world.wait(TAKEOVER_S + 1, "a")
    settle(world)
    assert world.state is State.DOWN


def test_they_are_given_back_beside_serving() -> None:
    world = three()
    world.lose("b")
    world.wait(TAKEOVER_S + 1, "a", "c")
    settle(world)
    world.took(actions.Assign)
    world.join("b", 1)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b", "c"]}
    assert serving(world)
    assert all(a.beside for a in world.took(actions.Assign)), "it was moved, not formed anew"


def test_they_are_given_back_the_hard_way_where_pages_cannot_be_copied() -> None:
    world = three()
    world.lose("b")
    world.wait(TAKEOVER_S + 1, "a", "c")
    settle(world)
    other = {"b": "another layout"}
    world.join("b", 1, tp=2)
    for _ in range(20):
        settle(world, layouts=other)
        world.wait(1.0, "a", "b", "c")
    assert stages(world) == {"pipeline-0": ["a", "b", "c"]}
    assert serving(world)


def test_a_loss_among_the_survivors_is_survived() -> None:
    world = three()
    world.lose("b")
    world.wait(TAKEOVER_S + 1, "a", "c")
    settle(world)
    world.lose("a")
    world.wait(TAKEOVER_S + 1, "c")
    settle(world)
    assert stages(world) == {"pipeline-0": ["c"]}


def test_what_never_served_waits_for_its_workers() -> None:
    world = World(target(3, takeover_s=TAKEOVER_S))
    world.gateway()
    world.join("a", 0)
    world.wait(3 * TAKEOVER_S, "a")
    assert world.state is State.DOWN
    assert not world.took(actions.Assign)


def test_another_pipeline_that_serves_is_enough() -> None:
    world = World(target(2, takeover_s=TAKEOVER_S))
    world.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1)):
        world.join(name, pool)
    settle(world)
    world.lose("b2")
    world.wait(TAKEOVER_S + 1, "a", "b")
    settle(world)
    assert stages(world)["pipeline-0"] == ["a", "b"]
    assert world.mesh.pipelines["pipeline-1"].state is State.DOWN


def replicas_lost_and_taken_over() -> World:
    """Two pipelines shared `b`; the replicas of stage 0 are gone, and it has taken their layers over."""
    world = World(target(2, takeover_s=1.0))
    world.gateway()
    world.join("a", 0), world.join("b")
    settle(world)
    world.join("a2", 0)
    settle(world)
    world.lose("a"), world.lose("a2")
    settle(world)
    world.wait(1.5, "b")
    settle(world)
    assert stages(world)["pipeline-0"] == ["b"]
    return world


def test_no_second_pipeline_is_made_before_the_first_has_all_its_stages() -> None:
    world = replicas_lost_and_taken_over()
    world.wait(4, "b")
    world.join("a", 0)
    world.prepared("a"), world.prepared("b")
    world.join("a2", 0)
    move = world.mesh.moves["pipeline-0"]
    world.send(events.StepFailed("pipeline-0", move.epoch, 0, "link", "not answered"))
    assert stages(world) == {"pipeline-0": ["b"], "pipeline-1": []}
    for _ in range(20):
        settle(world)
        world.wait(1, *world.mesh.workers)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b"]}


def test_a_second_pipeline_is_tried_again_when_the_first_is_whole() -> None:
    world = replicas_lost_and_taken_over()
    world.send(events.StepsStuck("g", "pipeline-0", world.epoch, "no step came back"))
    world.join("a", 0), world.join("a2", 0)
    for _ in range(20):
        settle(world)
        world.wait(1, *world.mesh.workers)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b"]}
    assert [p.shares for p in world.mesh.pipelines.values()] == [2, 2]
