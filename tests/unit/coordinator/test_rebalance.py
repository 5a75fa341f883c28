"""Layers that move by themselves because steps would be faster, and what an operator is told."""

from __future__ import annotations

import pytest
from mesh_world import World, serving, target

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.cost import CostModel, Kind
from stagemesh.coordinator.pipeline import State
from stagemesh.coordinator.rebalance import advise, better_worker


def measured(world: World, *milliseconds: float) -> None:
    """A gateway says so."""
    world.send(events.StepsMeasured("g", "pipeline-0", world.epoch, tuple(ms / 1000 for ms in milliseconds)))


def kinds_of(world: World, count: int = 2) -> tuple[CostModel, list[Kind]]:
    return world.mesh.target.cost, [Kind(1, 0, 1e11, 1e10)] * count


class TestAdvice:
    def test_layers_go_to_where_they_take_less(self) -> None:
        cost, kinds = kinds_of(World())
        advice = advise(cost, kinds, [(0, 3), (3, 6)], [0.030, 0.015])
        assert advice.ranges == ((0, 2), (2, 6))
        assert advice.now_s == 0.030
        assert advice.then_s == pytest.approx(0.020, rel=0.01)
        assert advice.gain == pytest.approx(1 / 3, rel=0.01)

    def test_what_is_best_already_stays(self) -> None:
        cost, kinds = kinds_of(World())
        advice = advise(cost, kinds, [(0, 2), (2, 6)], [0.020, 0.020])
        assert (advice.ranges, advice.gain) == (((0, 2), (2, 6)), 0.0)

    def test_a_faster_worker_that_holds_nothing(self) -> None:
        cost = World().mesh.target.cost
        slow = [v.WorkerInfo(n, 1, n, bytes_per_s=1e10, flops_per_s=1e11) for n in "ab"]
        fast = v.WorkerInfo("fast", 1, "fast", bytes_per_s=1e11, flops_per_s=1e12)
        found = better_worker(cost, slow, [(0, 3), (3, 6)], [fast])
        assert found is not None
        assert (found.spare, found.member in "ab") == ("fast", True)
        assert found.faster > 1.4
        assert better_worker(cost, slow, [(0, 3), (3, 6)], [v.WorkerInfo("c", 1, "c", bytes_per_s=1e10)]) is None
        bound = v.WorkerInfo("fast", 1, "fast", pool=1, bytes_per_s=1e11, flops_per_s=1e12)
        found = better_worker(cost, slow, [(0, 3), (3, 6)], [bound])
        assert found is not None
        assert found.member == "b"


def rebalancing() -> World:
    world = World(target(2, rebalance=True))
    world.join("a"), world.join("b")
    world.serve()
    world.gateway()
    world.wait(60, "a", "b")
    world.actions.clear()
    return world


def steps(world: World, seconds: float, *milliseconds: float) -> None:
    """A gateway reports for a while."""
    for _ in range(int(seconds / 2)):
        measured(world, *milliseconds)
        world.wait(2, "a", "b")


def finish(world: World) -> None:
    world.prepared("a"), world.prepared("b")
    world.took(actions.Assign)
    world.prepare_move()
    world.moved()


class TestRebalance:
    def test_what_lasts_moves_layers_and_what_came_of_it_is_kept(self) -> None:
        world = rebalancing()
        steps(world, 8, 30, 15)
        assert not world.took(actions.Prepare), "not at the first sight"
        steps(world, 12, 30, 15)
        assert world.mesh.ranges == ((0, 2), (2, 6))
        finish(world)
        assert world.ranges == [(0, 2), (2, 6)]
        steps(world, 4, 21, 20)
        (outcome,) = world.mesh.step_times["pipeline-0"].outcomes
        assert (outcome.epoch, outcome.before_s) == (world.epoch, 0.030)
        assert outcome.expected_s == pytest.approx(0.020, rel=0.01)
        assert outcome.after_s == pytest.approx(0.021)

    def test_what_comes_and_goes_does_not(self) -> None:
        world = rebalancing()
        for _ in range(6):
            steps(world, 6, 30, 15)
            steps(world, 6, 22, 20)
        assert world.ranges == [(0, 3), (3, 6)]
        assert not world.took(actions.Prepare)

    def test_not_again_at_once(self) -> None:
        world = rebalancing()
        steps(world, 20, 30, 15)
        finish(world)
        world.actions.clear()
        steps(world, 40, 10, 26)
        assert world.mesh.ranges is None
        steps(world, 40, 10, 26)
        assert world.mesh.ranges is not None

    def test_much_later_where_the_last_time_was_in_vain(self) -> None:
        world = rebalancing()
        steps(world, 20, 30, 15)
        finish(world)
        world.actions.clear()
        steps(world, 300, 10, 40)
        assert world.mesh.ranges is None
        steps(world, 340, 10, 40)
        assert world.mesh.ranges is not None

    def test_old_news_says_nothing(self) -> None:
        world = rebalancing()
        measured(world, 30, 15)
        world.wait(60, "a", "b")
        assert world.mesh.ranges is None

    def test_without_the_setting_it_is_only_advised(self) -> None:
        world = serving()
        for _ in range(15):
            measured(world, 30, 15)
            world.wait(2, "a", "b")
        assert world.ranges == [(0, 3), (3, 6)]
        (advice,) = world.mesh.advices
        assert "stagemesh repartition 2,4" in advice
        assert "20.0 ms a step, not 30.0" in advice

    def test_a_faster_worker_that_joins_is_advised(self) -> None:
        world = serving()
        world.join("fast", bytes_per_s=1e11, flops_per_s=1e12)
        world.wait(6, "a", "b", "fast")
        assert any("with fast in the place of" in text for text in world.mesh.advices)
        assert world.state is State.SERVING

    def test_auto_follows_what_was_measured(self) -> None:
        world = serving()
        assert world.mesh.ranges_for([]) == ((0, 3), (3, 6))
        measured(world, 30, 15)
        assert world.mesh.ranges_for([]) == ((0, 2), (2, 6))
