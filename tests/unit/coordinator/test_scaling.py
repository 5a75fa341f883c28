"""Pipelines that share stages: how many there are, who is shared, and what becomes of them when workers come and go."""

from __future__ import annotations

import contextlib
import random

import pytest
from mesh_world import REVISION, World, target

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.moving import GONE_S
from stagemesh.coordinator.pipeline import State
from stagemesh.coordinator.scaling import LEAVE_S, MISSED_S
from stagemesh.errors import ConfigError, Unavailable

PAGES = 48


def settle(world: World, pages: int = PAGES, layouts: dict[str, str] | None = None) -> None:
    """Workers and gateways do all that they are told, until nothing more is. `layouts`: of workers whose pages are laid
    out otherwise."""
    seen = 0
    while seen < len(world.actions):
        for action in world.actions[seen:]:
            seen += 1
            match action:
                case actions.Assign(name, epoch, _, plan, _, shares):
                    layout = (layouts or {}).get(plan.worker_id, "")
                    loaded = v.Loaded(pages // shares, 1, 2, REVISION, layout)
                    world.send(events.AssignDone(name, epoch, plan.stage, loaded))
                case actions.MakeLink(name, epoch, stage):
                    index = action.copy.index if action.copy is not None else None
                    world.send(events.LinkUp(name, epoch, stage, "tcp", index))
                case actions.Activate(name, epoch, stage):
                    world.send(events.Activated(name, epoch, stage))
                case actions.Prepare(name, incarnation, _, layers):
                    world.send(events.Prepared(name, incarnation, layers, REVISION))
        for name, move in list(world.mesh.moves.items()):
            if move.published:
                world.send(events.GatewayMoved("g", name, move.epoch))
        for name, pipeline in list(world.mesh.pipelines.items()):
            if pipeline.leaving:
                world.send(events.GatewayLeft("g", name))


def stages(world: World) -> dict[str, list[str]]:
    """Pipeline -> its workers."""
    return {name: [plan.worker_id for plan in p.stages] for name, p in world.mesh.pipelines.items()}


def shares(world: World) -> list[int]:
    return [p.shares for p in world.mesh.pipelines.values()]


def serving(world: World) -> bool:
    return all(p.state is State.SERVING for p in world.mesh.pipelines.values())


@pytest.fixture
def world() -> World:
    """Two stages that serve, bound workers, and a gateway."""
    made = World()
    made.gateway()
    made.join("a", 0)
    made.join("b", 1)
    settle(made)
    assert stages(made) == {"pipeline-0": ["a", "b"]}
    return made


def test_one_more_worker_for_a_stage_is_one_more_pipeline(world: World) -> None:
    world.took(actions.Log)
    world.join("b2", 1)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a", "b2"]}
    assert shares(world) == [2, 2]
    assert serving(world)
    # Before another one gets pages of a worker, those who have them all do with fewer.
    order = [(a.pipeline_id, a.shares, a.beside) for a in world.took(actions.Assign)]
    assert order == [("pipeline-0", 2, True)] * 2 + [("pipeline-1", 2, False)] * 2


def test_a_standby_becomes_a_replica_when_an_operator_wants_it(world: World) -> None:
    world.join("c")
    settle(world)
    assert len(stages(world)) == 1
    assert world.mesh.check_scale(0, 2) == 2
    world.send(events.ScaleRequested(0, 2))
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["c", "b"]}
    world.send(events.ScaleRequested(0, 1))
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"]}
    assert shares(world) == [1], "it has the pages of all its workers again"
    assert [a.replicas for a in world.took(actions.PersistReplicas)] == [((0, 2),), ((0, 1),)]
    assert world.mesh.workers["c"].kept is not None, "a standby again"


def test_two_replicas_of_each_stage_share_nothing_and_three_share_the_least(world: World) -> None:
    world.join("a2", 0)
    world.join("b2", 1)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b2"]}
    world.join("b3", 1)
    settle(world)
    assert stages(world)["pipeline-2"] == ["a", "b3"]
    assert shares(world) == [3, 3, 3]
    world.join("b4", 1)
    settle(world)
    assert stages(world)["pipeline-3"] == ["a2", "b4"]


def test_a_stage_that_was_shared_is_no_longer_when_it_gets_a_worker(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    world.took(actions.Assign)
    world.join("a2", 0)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b2"]}
    assert all(a.beside for a in world.took(actions.Assign)), "while it served"
    world.send(events.ScaleRequested(0, 1))
    settle(world)
    assert len({names[0] for names in stages(world).values()}) == 1
    assert {names[1] for names in stages(world).values()} == {"b", "b2"}


def test_what_fails_again_and_again_is_given_up_until_something_changes(world: World) -> None:
    world.join("b2", 1)
    for _ in range(3):
        world.wait(3.0, "a", "b", "b2")
        for name, move in list(world.mesh.moves.items()):
            world.send(events.StepFailed(name, move.epoch, 0, "assign", "boom"))
    assert "pipeline-0 stays as it is: 2 moves failed, the last one because stage 0: assign: boom" in (
        world.mesh.given_up
    )
    world.took(actions.Assign)
    world.wait(10.0, "a", "b", "b2")
    assert not world.took(actions.Assign)
    assert world.mesh.pipelines["pipeline-0"].state is State.SERVING
    world.send(events.ScaleRequested(1, 2))
    settle(world)
    assert serving(world)
    assert len(stages(world)) == 2


def test_a_pipeline_that_is_left_finishes_first(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    world.took(actions.Release)
    world.send(events.ScaleRequested(1, 1))
    assert world.mesh.pipelines["pipeline-1"].leaving
    assert world.mesh.pipelines["pipeline-1"].state is State.DRAINING
    world.wait(1.0, "a", "b", "b2")
    assert not world.took(actions.Release), "its gateway has not left it"
    world.send(events.GatewayLeft("g", "pipeline-1"))
    assert {a.worker_id for a in world.took(actions.Release)} == {"a", "b2"}
    assert [
        a.pipeline_id for a in world.mesh.handle(events.Tick(), world.now) if isinstance(a, actions.ForgetPlan)
    ] == []
    assert list(stages(world)) == ["pipeline-0"]


def test_a_gateway_that_does_not_leave_is_not_waited_for_for_ever(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    world.send(events.ScaleRequested(1, 1))
    world.wait(LEAVE_S + 1, "a", "b", "b2")
    assert list(stages(world)) == ["pipeline-0"]


def test_who_is_wanted_again_while_it_is_left_stays(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    epoch = world.mesh.pipelines["pipeline-1"].epoch
    world.send(events.ScaleRequested(1, 1))
    world.send(events.ScaleRequested(1, 0))
    pipeline = world.mesh.pipelines["pipeline-1"]
    assert (pipeline.state, pipeline.epoch, pipeline.leaving) == (State.SERVING, epoch, False)


def test_a_name_that_comes_again_never_has_an_epoch_again(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    before = world.mesh.pipelines["pipeline-1"].epoch
    for replicas in (1, 0):
        world.send(events.ScaleRequested(1, replicas))
        settle(world)
    assert world.mesh.pipelines["pipeline-1"].epoch > before
    assert world.mesh.pipelines["pipeline-1"].state is State.SERVING


def test_the_worker_that_drains_takes_its_pipeline_with_it(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    world.send(events.DrainRequested("b"))
    settle(world)
    assert stages(world) == {"pipeline-1": ["a", "b2"]}
    assert shares(world) == [1]


def test_a_lost_replica_is_waited_for_and_the_other_pipeline_goes_on(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    world.lose("b2")
    settle(world)
    assert world.mesh.pipelines["pipeline-1"].state is State.DOWN
    assert world.mesh.pipelines["pipeline-0"].state is State.SERVING
    assert shares(world)[0] == 2, "it may come back in a moment"
    world.join("b2", 1)
    settle(world)
    assert serving(world)
    world.lose("b2")
    world.wait(MISSED_S + GONE_S, "a", "b")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"]}
    assert shares(world) == [1]


def test_the_loss_of_a_shared_worker_is_made_good_by_one_standby(world: World) -> None:
    world.join("b2", 1)
    world.join("c")
    settle(world)
    world.lose("a")
    settle(world)
    assert stages(world) == {"pipeline-0": ["c", "b"], "pipeline-1": ["c", "b2"]}
    assert serving(world)


def test_when_nothing_serves_a_replica_gives_its_worker(world: World) -> None:
    world.join("c")
    settle(world)
    world.send(events.ScaleRequested(1, 2))
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a", "c"]}
    world.lose("a")
    settle(world)
    (up,) = [p for p in world.mesh.pipelines.values() if p.state is State.SERVING]
    assert {plan.worker_id for plan in up.stages} == {"b", "c"}
    world.join("a", 0)
    settle(world)
    assert sum(p.state is State.SERVING for p in world.mesh.pipelines.values()) >= 1


def test_a_worker_of_no_stage_is_freed_for_a_replica(world: World) -> None:
    """`a` went and came back: what could hold any stage holds its own, and it can hold no other."""
    world.join("c")
    settle(world)
    world.lose("a")
    settle(world)
    world.join("a", 0)
    settle(world)
    assert stages(world) == {"pipeline-0": ["c", "b"]}
    assert world.mesh.check_scale(1, 2) == 2
    world.send(events.ScaleRequested(1, 2))
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a", "c"]}
    assert serving(world)


def test_a_shared_worker_that_drains_is_replaced_on_all_its_pipelines(world: World) -> None:
    world.join("b2", 1)
    world.join("c")
    settle(world)
    world.send(events.DrainRequested("a"))
    settle(world)
    assert stages(world) == {"pipeline-0": ["c", "b"], "pipeline-1": ["c", "b2"]}
    assert serving(world)


def test_other_ranges_come_to_all_pipelines(world: World) -> None:
    world.join("b2", 1)
    settle(world)
    world.send(events.RepartitionRequested(((0, 2), (2, 6))))
    settle(world)
    for pipeline in world.mesh.pipelines.values():
        assert [plan.layers for plan in pipeline.stages] == [(0, 2), (2, 6)]
    world.send(events.Tick())
    assert world.mesh.ranges is None
    assert serving(world)


def test_a_coordinator_that_starts_again_takes_all_of_them_up() -> None:
    before = World()
    before.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1)):
        before.join(name, pool)
    settle(before)
    plans = {a.plan.pipeline_id: a.plan for a in before.took(actions.PersistPlan)}
    epochs = {name: p.epoch for name, p in before.mesh.pipelines.items()}
    after = World(plans=plans, epochs=epochs)
    after.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1)):
        held = tuple(
            v.Held(n, p.epoch, s.stage, s.layers, s.generation, True, REVISION)
            for n, p in before.mesh.pipelines.items()
            for s in p.stages
            if s.worker_id == name
        )
        after.join(name, pool, held=held)
    after.wait(3.0, "a", "b", "b2")
    assert stages(after) == stages(before)
    assert {name: p.epoch for name, p in after.mesh.pipelines.items()} == epochs
    assert shares(after) == [2, 2]
    assert not after.took(actions.Assign), "they went on"


def test_what_cannot_be_is_said_before_anything_is_done(world: World) -> None:
    with pytest.raises(ConfigError, match="there is no stage 2"):
        world.mesh.check_scale(2, 2)
    with pytest.raises(ConfigError, match=r"stage 1 is held by 1 worker.*start 1 more with `stagemesh stage"):
        world.mesh.check_scale(1, 2)
    for number in range(16):
        world.join(f"c{number}")
    settle(world)
    with pytest.raises(ConfigError, match="would have 3 KV pages of 16 tokens for each of 13 pipelines"):
        world.mesh.check_scale(1, 13)
    assert world.mesh.check_scale(1, 12) == 12


@pytest.mark.parametrize("names", [("a", "b", "b2"), ("b", "b2", "a")])
def test_pages_for_one_pipeline_only_are_one_pipeline(names: tuple[str, ...]) -> None:
    world = World()
    world.gateway()
    pools = {"a": 0, "b": 1, "b2": 1}
    for name in names:
        world.join(name, pools[name])
    settle(world, pages=6)
    world.wait(5.0, *names)
    settle(world, pages=6)
    assert serving(world)
    assert shares(world) == [1]
    (stage_1,) = [workers[1] for workers in stages(world).values()]
    world.lose(stage_1)
    settle(world, pages=6)
    assert serving(world), "the other one takes its place"
    assert not any(worker.refusals for worker in world.mesh.workers.values())


def test_a_pipeline_is_formed_when_nobody_is_waited_for_any_more() -> None:
    world = World(target(3))
    world.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1), ("c", 2), ("c2", 2)):
        world.join(name, pool)
    settle(world)
    world.lose("b2")
    settle(world)
    assert not serving(world)
    world.wait(MISSED_S + 1, "a", "b", "c", "c2")
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b", "c"], "pipeline-1": ["a", "b", "c2"]}
    assert serving(world)


def test_at_random_it_settles_on_all_that_can_serve() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    for number in range(40):
        rng = random.Random(f"{seed} {number}")
        world = World(target(rng.choice((2, 3))))
        world.gateway()
        pools = {f"w{i}": rng.choice((-1, -1, *range(world.mesh.target.num_stages))) for i in range(7)}
        story: list[tuple[object, ...]] = []
        for _ in range(rng.randrange(4, 16)):
            happen(world, rng, pools, story)
            if rng.random() < 0.7:
                settle(world)
            quiet(world, rng.choice((0.5, 0.5, 3.0)))
        for _ in range(20):
            settle(world)
            world.actions.clear()
            quiet(world, 3.0)
        epochs = {name: p.epoch for name, p in world.mesh.pipelines.items()}
        down = [name for name, p in world.mesh.pipelines.items() if p.state is not State.SERVING]
        # What makes everybody look again would be of no use.
        world.mesh._version += 1
        quiet(world, 5.0)
        settle(world)
        after = {name: p.epoch for name, p in world.mesh.pipelines.items() if name not in down}
        assert after == {name: epoch for name, epoch in epochs.items() if name not in down}, (number, story)
        assert down == [n for n, p in world.mesh.pipelines.items() if p.state is not State.SERVING], (number, story)


def quiet(world: World, seconds: float) -> None:
    """Time passes, and nothing else."""
    end = world.now + seconds
    while world.now < end:
        world.now += 0.5
        for name in list(world.mesh.workers):
            world.send(events.LeaseRenewed(name, world.lives[name]))
        world.send(events.Tick())


def happen(world: World, rng: random.Random, pools: dict[str, int], story: list[tuple[object, ...]]) -> None:
    """A worker comes, goes or drains, or an operator scales."""
    name, here = rng.choice(sorted(pools)), sorted(world.mesh.workers)
    what = rng.choices(("join", "lose", "drain", "scale"), (5, 2, 1, 2))[0]
    story.append((what, name))
    if what == "join" and name not in here:
        world.join(name, pools[name])
    elif what == "lose" and name in here:
        world.lose(name)
    elif what == "drain":
        world.send(events.DrainRequested(name))
    elif what == "scale":
        stage, replicas = rng.randrange(world.mesh.target.num_stages), rng.randrange(4)
        story[-1] = (what, stage, replicas)
        with contextlib.suppress(ConfigError, Unavailable):
            world.mesh.check_scale(stage, replicas)
            world.send(events.ScaleRequested(stage, replicas))


def test_in_the_midst_of_an_upgrade_nothing_is_shared() -> None:
    world = World(target())
    world.gateway()
    world.join("a", 0, protocol=2)
    world.join("b", 1)
    world.join("b2", 1)
    settle(world)
    assert stages(world) == {"pipeline-0": ["a", "b"]}
    with pytest.raises(ConfigError, match="a cannot share stages: finish the upgrade first"):
        world.mesh.check_scale(1, 2)


def test_what_is_down_must_serve_before_there_can_be_more_of_it(world: World) -> None:
    world.join("c")
    settle(world)
    world.lose("a")
    with pytest.raises(Unavailable, match="pipeline-0 must have all stages again first"):
        world.mesh.check_scale(1, 2)
    assert world.mesh.check_scale(1, 1) == 1
