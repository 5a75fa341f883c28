"""Layers that move by themselves because steps would be faster, and what an operator is told."""

from __future__ import annotations

import pytest
from mesh_world import Story, introduction, measured, serving, target

from stagemesh.coordinator.planning.advice import advise, better_worker
from stagemesh.coordinator.policy.ranges import ranges_for
from stagemesh.coordinator.world.pipeline import State
from stagemesh.planning.cost import CostModel, Kind
from stagemesh.protos.v1.stage_pb2 import AssignRequest, PrepareRequest


def measure(story: Story, *milliseconds: float) -> None:
    """A gateway says so."""
    story.send(measured("pipeline-0", story.epoch, *milliseconds))


def kinds_of(story: Story, count: int = 2) -> tuple[CostModel, list[Kind]]:
    return story.world.target.cost, [Kind(1, 0, 1e11, 1e10)] * count


class TestAdvice:
    def test_layers_go_to_where_they_take_less(self) -> None:
        cost, kinds = kinds_of(Story())
        advice = advise(cost, kinds, [(0, 3), (3, 6)], [0.030, 0.015])
        assert advice.ranges == ((0, 2), (2, 6))
        assert advice.now_s == 0.030
        assert advice.then_s == pytest.approx(0.020, rel=0.01)
        assert advice.gain == pytest.approx(1 / 3, rel=0.01)

    def test_what_is_best_already_stays(self) -> None:
        cost, kinds = kinds_of(Story())
        advice = advise(cost, kinds, [(0, 2), (2, 6)], [0.020, 0.020])
        assert (advice.ranges, advice.gain) == (((0, 2), (2, 6)), 0.0)

    def test_a_faster_worker_that_holds_nothing(self) -> None:
        cost = Story().world.target.cost
        slow = [introduction(name) for name in "ab"]
        fast = introduction("fast", bytes_per_s=1e11, flops_per_s=1e12)
        found = better_worker(cost, slow, [(0, 3), (3, 6)], [fast])
        assert found is not None
        assert (found.spare, found.member in "ab") == ("fast", True)
        assert found.faster > 1.4
        assert better_worker(cost, slow, [(0, 3), (3, 6)], [introduction("c", flops_per_s=0)]) is None
        bound = introduction("fast", pool=1, bytes_per_s=1e11, flops_per_s=1e12)
        found = better_worker(cost, slow, [(0, 3), (3, 6)], [bound])
        assert found is not None
        assert found.member == "b"


def rebalancing() -> Story:
    story = Story(target(2, rebalance=True))
    story.join("a"), story.join("b")
    story.serve()
    story.gateway()
    story.wait(60, "a", "b")
    story.actions.clear()
    return story


def steps(story: Story, seconds: float, *milliseconds: float) -> None:
    """A gateway reports for a while."""
    for _ in range(int(seconds / 2)):
        measure(story, *milliseconds)
        story.wait(2, "a", "b")


def finish(story: Story) -> None:
    story.prepared("a"), story.prepared("b")
    story.took(AssignRequest)
    story.prepare_move()
    story.moved()


class TestRebalance:
    def test_what_lasts_moves_layers_and_what_came_of_it_is_kept(self) -> None:
        story = rebalancing()
        steps(story, 8, 30, 15)
        assert not story.took(PrepareRequest), "not at the first sight"
        steps(story, 12, 30, 15)
        assert story.world.wanted_ranges == ((0, 2), (2, 6))
        finish(story)
        assert story.ranges == [(0, 2), (2, 6)]
        steps(story, 4, 21, 20)
        (outcome,) = story.pipeline.steps.outcomes
        assert (outcome.epoch, outcome.before_s) == (story.epoch, 0.030)
        assert outcome.expected_s == pytest.approx(0.020, rel=0.01)
        assert outcome.after_s == pytest.approx(0.021)

    def test_what_comes_and_goes_does_not(self) -> None:
        story = rebalancing()
        for _ in range(6):
            steps(story, 6, 30, 15)
            steps(story, 6, 22, 20)
        assert story.ranges == [(0, 3), (3, 6)]
        assert not story.took(PrepareRequest)

    def test_not_again_at_once(self) -> None:
        story = rebalancing()
        steps(story, 20, 30, 15)
        finish(story)
        story.actions.clear()
        steps(story, 40, 10, 26)
        assert story.world.wanted_ranges is None
        steps(story, 40, 10, 26)
        assert story.world.wanted_ranges is not None

    def test_much_later_where_the_last_time_was_in_vain(self) -> None:
        story = rebalancing()
        steps(story, 20, 30, 15)
        finish(story)
        story.actions.clear()
        steps(story, 300, 10, 40)
        assert story.world.wanted_ranges is None
        steps(story, 340, 10, 40)
        assert story.world.wanted_ranges is not None

    def test_old_news_says_nothing(self) -> None:
        story = rebalancing()
        measure(story, 30, 15)
        story.wait(60, "a", "b")
        assert story.world.wanted_ranges is None

    def test_without_the_setting_it_is_only_advised(self) -> None:
        story = serving()
        for _ in range(15):
            measure(story, 30, 15)
            story.wait(2, "a", "b")
        assert story.ranges == [(0, 3), (3, 6)]
        (advice,) = story.world.advices
        assert "stagemesh repartition 2,4" in advice
        assert "20.0 ms a step, not 30.0" in advice

    def test_a_faster_worker_that_joins_is_advised(self) -> None:
        story = serving()
        story.join("fast", bytes_per_s=1e11, flops_per_s=1e12)
        story.wait(6, "a", "b", "fast")
        assert any("with fast in the place of" in text for text in story.world.advices)
        assert story.state is State.SERVING

    def test_auto_follows_what_was_measured(self) -> None:
        story = serving()
        assert ranges_for(story.world, [], story.now) == ((0, 3), (3, 6))
        measure(story, 30, 15)
        assert ranges_for(story.world, [], story.now) == ((0, 2), (2, 6))
