"""Pipelines that share stages: how many there are, who is shared, and what becomes of them when workers come and go."""

from __future__ import annotations

import contextlib
import random

import pytest
from mesh_world import (
    TIMING,
    Story,
    done,
    drain,
    held,
    is_awaited,
    left,
    order,
    renewal,
    repartition,
    scale,
    switched,
    target,
)

from stagemesh.coordinator.core import actions
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.world.pipeline import Phase, State
from stagemesh.errors import ConfigError, Unavailable
from stagemesh.protos.v1.stage_pb2 import AssignRequest, ReleaseRequest

PAGES = 48


def settle(story: Story, pages: int = PAGES, layouts: dict[str, str] | None = None) -> None:
    """Workers and gateways do all that they are told, until nothing more is. `layouts`: of workers whose pages are laid
    out otherwise."""
    seen = 0
    while seen < len(story.actions):
        for action in story.actions[seen:]:
            seen += 1
            if is_awaited(action):
                story.send(done(action, pages, layout=(layouts or {}).get(action.to.worker_id, "")))
        for name, move in list(story.moves.items()):
            if move.phase is Phase.SWITCH:
                story.send(switched("g", name, move.epoch))
        for name, pipeline in list(story.pipelines.items()):
            if pipeline.leaving:
                story.send(left("g", name))


def stages(story: Story) -> dict[str, list[str]]:
    """Pipeline -> its workers."""
    return {name: [plan.worker_id for plan in p.stages] for name, p in story.pipelines.items()}


def shares(story: Story) -> list[int]:
    return [p.main.shares if p.main is not None else 1 for p in story.pipelines.values()]


def serving(story: Story) -> bool:
    return all(p.state is State.SERVING for p in story.pipelines.values())


@pytest.fixture
def story() -> Story:
    """Two stages that serve, bound workers, and a gateway."""
    made = Story()
    made.gateway()
    made.join("a", 0)
    made.join("b", 1)
    settle(made)
    assert stages(made) == {"pipeline-0": ["a", "b"]}
    return made


def test_one_more_worker_for_a_stage_is_one_more_pipeline(story: Story) -> None:
    story.took(actions.Log)
    story.join("b2", 1)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a", "b2"]}
    assert shares(story) == [2, 2]
    assert serving(story)
    # Before another one gets pages of a worker, those who have them all do with fewer.
    order = [
        (a.request.key.pipeline_id, a.request.limits.pipelines, a.request.beside) for a in story.took(AssignRequest)
    ]
    assert order == [("pipeline-0", 2, True)] * 2 + [("pipeline-1", 2, False)] * 2


def test_a_standby_becomes_a_replica_when_an_operator_wants_it(story: Story) -> None:
    story.join("c")
    settle(story)
    assert len(stages(story)) == 1
    assert story.check_scale(0, 2) == 2
    story.send(scale(0, 2))
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["c", "b"]}
    story.send(scale(0, 1))
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"]}
    assert shares(story) == [1], "it has the pages of all its workers again"
    written = [a.after.replicas for a in story.took(actions.Save) if a.after.replicas != a.before.replicas]
    assert written == [{0: 2}, {0: 1}]
    assert story.world.workers["c"].kept is not None, "a standby again"


def test_two_replicas_of_each_stage_share_nothing_and_three_share_the_least(story: Story) -> None:
    story.join("a2", 0)
    story.join("b2", 1)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b2"]}
    story.join("b3", 1)
    settle(story)
    assert stages(story)["pipeline-2"] == ["a", "b3"]
    assert shares(story) == [3, 3, 3]
    story.join("b4", 1)
    settle(story)
    assert stages(story)["pipeline-3"] == ["a2", "b4"]


def test_a_stage_that_was_shared_is_no_longer_when_it_gets_a_worker(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    story.took(AssignRequest)
    story.join("a2", 0)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b2"]}
    assert all(a.request.beside for a in story.took(AssignRequest)), "while it served"
    story.send(scale(0, 1))
    settle(story)
    assert len({names[0] for names in stages(story).values()}) == 1
    assert {names[1] for names in stages(story).values()} == {"b", "b2"}


def test_what_fails_again_and_again_is_given_up_until_something_changes(story: Story) -> None:
    story.join("b2", 1)
    for _ in range(3):
        story.wait(3.0, "a", "b", "b2")
        for name, move in list(story.moves.items()):
            story.send(events.Failed(order("assign", name, move.epoch, 0), "boom"))
    assert "pipeline-0 stays as it is: 2 moves failed, the last one because stage 0: assign: boom" in (
        story.world.given_up
    )
    story.took(AssignRequest)
    story.wait(10.0, "a", "b", "b2")
    assert not story.took(AssignRequest)
    assert story.pipelines["pipeline-0"].state is State.SERVING
    story.send(scale(1, 2))
    settle(story)
    assert serving(story)
    assert len(stages(story)) == 2


def test_a_pipeline_that_is_left_finishes_first(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    story.took(ReleaseRequest)
    story.send(scale(1, 1))
    assert story.pipelines["pipeline-1"].leaving
    assert story.pipelines["pipeline-1"].state is State.DRAINING
    story.wait(1.0, "a", "b", "b2")
    assert not story.took(ReleaseRequest), "its gateway has not left it"
    story.send(left("g", "pipeline-1"))
    assert {a.to.worker_id for a in story.took(ReleaseRequest)} == {"a", "b2"}
    assert list(stages(story)) == ["pipeline-0"]
    assert list(story.written.plans) == ["pipeline-0"], "it is not to be taken up again"


def test_a_gateway_that_does_not_leave_is_not_waited_for_for_ever(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    story.send(scale(1, 1))
    story.wait(TIMING.leave_s + 1, "a", "b", "b2")
    assert list(stages(story)) == ["pipeline-0"]


def test_who_is_wanted_again_while_it_is_left_stays(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    epoch = story.pipelines["pipeline-1"].epoch
    story.send(scale(1, 1))
    story.send(scale(1, 0))
    pipeline = story.pipelines["pipeline-1"]
    assert (pipeline.state, pipeline.epoch, pipeline.leaving) == (State.SERVING, epoch, None)


def test_a_name_that_comes_again_never_has_an_epoch_again(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    before = story.pipelines["pipeline-1"].epoch
    for replicas in (1, 0):
        story.send(scale(1, replicas))
        settle(story)
    assert story.pipelines["pipeline-1"].epoch > before
    assert story.pipelines["pipeline-1"].state is State.SERVING


def test_the_worker_that_drains_takes_its_pipeline_with_it(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    story.send(drain("b"))
    settle(story)
    assert stages(story) == {"pipeline-1": ["a", "b2"]}
    assert shares(story) == [1]


def test_a_lost_replica_is_waited_for_and_the_other_pipeline_goes_on(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    story.lose("b2")
    settle(story)
    assert story.pipelines["pipeline-1"].state is State.DOWN
    assert story.pipelines["pipeline-0"].state is State.SERVING
    assert shares(story)[0] == 2, "it may come back in a moment"
    story.join("b2", 1)
    settle(story)
    assert serving(story)
    story.lose("b2")
    story.wait(TIMING.missed_s + TIMING.gone_s, "a", "b")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"]}
    assert shares(story) == [1]


def test_the_loss_of_a_shared_worker_is_made_good_by_one_standby(story: Story) -> None:
    story.join("b2", 1)
    story.join("c")
    settle(story)
    story.lose("a")
    settle(story)
    assert stages(story) == {"pipeline-0": ["c", "b"], "pipeline-1": ["c", "b2"]}
    assert serving(story)


def test_when_nothing_serves_a_replica_gives_its_worker(story: Story) -> None:
    story.join("c")
    settle(story)
    story.send(scale(1, 2))
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a", "c"]}
    story.lose("a")
    settle(story)
    (up,) = [p for p in story.pipelines.values() if p.state is State.SERVING]
    assert {plan.worker_id for plan in up.stages} == {"b", "c"}
    story.join("a", 0)
    settle(story)
    assert sum(p.state is State.SERVING for p in story.pipelines.values()) >= 1


def test_a_worker_of_no_stage_is_freed_for_a_replica(story: Story) -> None:
    """`a` went and came back: what could hold any stage holds its own, and it can hold no other."""
    story.join("c")
    settle(story)
    story.lose("a")
    settle(story)
    story.join("a", 0)
    settle(story)
    assert stages(story) == {"pipeline-0": ["c", "b"]}
    assert story.check_scale(1, 2) == 2
    story.send(scale(1, 2))
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a", "c"]}
    assert serving(story)


def test_a_shared_worker_that_drains_is_replaced_on_all_its_pipelines(story: Story) -> None:
    story.join("b2", 1)
    story.join("c")
    settle(story)
    story.send(drain("a"))
    settle(story)
    assert stages(story) == {"pipeline-0": ["c", "b"], "pipeline-1": ["c", "b2"]}
    assert serving(story)


def test_other_ranges_come_to_all_pipelines(story: Story) -> None:
    story.join("b2", 1)
    settle(story)
    story.send(repartition(2, 4))
    settle(story)
    for pipeline in story.pipelines.values():
        assert [plan.layers for plan in pipeline.stages] == [(0, 2), (2, 6)]
    story.send(events.Tick())
    assert story.world.wanted_ranges is None
    assert serving(story)


def test_a_coordinator_that_starts_again_takes_all_of_them_up() -> None:
    before = Story()
    before.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1)):
        before.join(name, pool)
    settle(before)
    epochs = {name: p.epoch for name, p in before.pipelines.items()}
    after = Story(record=before.written.copy())
    after.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1)):
        holds = tuple(held(n, p.epoch, s) for n, p in before.pipelines.items() for s in p.stages if s.worker_id == name)
        after.join(name, pool, held=holds)
    after.wait(3.0, "a", "b", "b2")
    assert stages(after) == stages(before)
    assert {name: p.epoch for name, p in after.pipelines.items()} == epochs
    assert shares(after) == [2, 2]
    assert not after.took(AssignRequest), "they went on"


def test_what_cannot_be_is_said_before_anything_is_done(story: Story) -> None:
    with pytest.raises(ConfigError, match="there is no stage 2"):
        story.check_scale(2, 2)
    with pytest.raises(ConfigError, match=r"stage 1 is held by 1 worker.*start 1 more with `stagemesh stage"):
        story.check_scale(1, 2)
    for number in range(16):
        story.join(f"c{number}")
    settle(story)
    with pytest.raises(ConfigError, match="would have 3 KV pages of 16 tokens for each of 13 pipelines"):
        story.check_scale(1, 13)
    assert story.check_scale(1, 12) == 12


@pytest.mark.parametrize("names", [("a", "b", "b2"), ("b", "b2", "a")])
def test_pages_for_one_pipeline_only_are_one_pipeline(names: tuple[str, ...]) -> None:
    story = Story()
    story.gateway()
    pools = {"a": 0, "b": 1, "b2": 1}
    for name in names:
        story.join(name, pools[name])
    settle(story, pages=6)
    story.wait(5.0, *names)
    settle(story, pages=6)
    assert serving(story)
    assert shares(story) == [1]
    (stage_1,) = [workers[1] for workers in stages(story).values()]
    story.lose(stage_1)
    settle(story, pages=6)
    assert serving(story), "the other one takes its place"
    assert not any(worker.refusals for worker in story.world.workers.values())


def test_a_pipeline_is_formed_when_nobody_is_waited_for_any_more() -> None:
    story = Story(target(3))
    story.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1), ("c", 2), ("c2", 2)):
        story.join(name, pool)
    settle(story)
    story.lose("b2")
    settle(story)
    assert not serving(story)
    story.wait(TIMING.missed_s + 1, "a", "b", "c", "c2")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b", "c"], "pipeline-1": ["a", "b", "c2"]}
    assert serving(story)


def test_at_random_it_settles_on_all_that_can_serve() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    for number in range(40):
        rng = random.Random(f"{seed} {number}")
        story = Story(target(rng.choice((2, 3))))
        story.gateway()
        pools = {f"w{i}": rng.choice((-1, -1, *range(story.world.target.num_stages))) for i in range(7)}
        told: list[tuple[object, ...]] = []
        for _ in range(rng.randrange(4, 16)):
            happen(story, rng, pools, told)
            if rng.random() < 0.7:
                settle(story)
            quiet(story, rng.choice((0.5, 0.5, 3.0)))
        for _ in range(20):
            settle(story)
            story.actions.clear()
            quiet(story, 3.0)
        epochs = {name: p.epoch for name, p in story.pipelines.items()}
        down = [name for name, p in story.pipelines.items() if p.state is not State.SERVING]
        # What makes everybody look again would be of no use.
        story.world.membership_changed()
        quiet(story, 5.0)
        settle(story)
        after = {name: p.epoch for name, p in story.pipelines.items() if name not in down}
        assert after == {name: epoch for name, epoch in epochs.items() if name not in down}, (number, told)
        assert down == [n for n, p in story.pipelines.items() if p.state is not State.SERVING], (number, told)


def quiet(story: Story, seconds: float) -> None:
    """Time passes, and nothing else."""
    end = story.now + seconds
    while story.now < end:
        story.now += 0.5
        for name in list(story.world.workers):
            story.send(renewal(name, story.lives[name]))
        story.send(events.Tick())


def happen(story: Story, rng: random.Random, pools: dict[str, int], told: list[tuple[object, ...]]) -> None:
    """A worker comes, goes or drains, or an operator scales."""
    name, here = rng.choice(sorted(pools)), sorted(story.world.workers)
    what = rng.choices(("join", "lose", "drain", "scale"), (5, 2, 1, 2))[0]
    told.append((what, name))
    if what == "join" and name not in here:
        story.join(name, pools[name])
    elif what == "lose" and name in here:
        story.lose(name)
    elif what == "drain":
        story.send(drain(name))
    elif what == "scale":
        stage, replicas = rng.randrange(story.world.target.num_stages), rng.randrange(4)
        told[-1] = (what, stage, replicas)
        with contextlib.suppress(ConfigError, Unavailable):
            story.check_scale(stage, replicas)
            story.send(scale(stage, replicas))


def test_in_the_midst_of_an_upgrade_nothing_is_shared() -> None:
    story = Story(target())
    story.gateway()
    story.join("a", 0, protocol=2)
    story.join("b", 1)
    story.join("b2", 1)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b"]}
    with pytest.raises(ConfigError, match="a cannot share stages: finish the upgrade first"):
        story.check_scale(1, 2)


def test_what_is_down_must_serve_before_there_can_be_more_of_it(story: Story) -> None:
    story.join("c")
    settle(story)
    story.lose("a")
    with pytest.raises(Unavailable, match="pipeline-0 must have all stages again first"):
        story.check_scale(1, 2)
    assert story.check_scale(1, 1) == 1
