"""Fewer workers than stages: the others take the layers over, and give them back."""

from __future__ import annotations

import pytest
from mesh_world import LAYERS, Story, broken, order, stuck, target
from test_scaling import serving, settle, shares, stages

from stagemesh.coordinator import values as v
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.world.pipeline import State
from stagemesh.planning.cost import Kind
from stagemesh.protos.v1.stage_pb2 import AssignRequest

TAKEOVER_S = 5.0


def three() -> Story:
    """Three stages that serve, on workers that are bound to them, and a gateway."""
    made = Story(target(3, takeover_s=TAKEOVER_S))
    made.gateway()
    for pool, name in enumerate("abc"):
        made.join(name, pool)
    settle(made)
    assert stages(made) == {"pipeline-0": ["a", "b", "c"]}
    return made


def ranges(story: Story) -> list[v.Range]:
    return [plan.layers for plan in story.pipelines["pipeline-0"].stages]


def test_the_others_take_over_what_nobody_else_does() -> None:
    story = three()
    story.lose("b")
    settle(story)
    story.wait(TAKEOVER_S - 1, "a", "c")
    assert story.state is State.DOWN, "it may come back"
    story.wait(1.5, "a", "c")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "c"]}
    assert serving(story)
    assert ranges(story) == [(0, 3), (3, LAYERS)]


def test_one_is_enough_if_it_has_the_memory() -> None:
    story = three()
    story.lose("a")
    story.lose("c")
    settle(story)
    story.wait(TAKEOVER_S + 1, "b")
    settle(story)
    assert stages(story) == {"pipeline-0": ["b"]}
    assert ranges(story) == [(0, LAYERS)]


def test_memory_that_does_not_suffice_leaves_it_down() -> None:
    story = Story(target(2, takeover_s=TAKEOVER_S))
    story.gateway()
    cost, kind = story.world.target.cost, Kind(1, 0, 1e11, 1e10)
    first, last, whole = (cost.stage_memory(kind, *layers) for layers in ((0, 3), (3, 6), (0, 6)))
    for pool, name in enumerate("ab"):
        story.join(name, pool, memory_bytes=int(max(first, last) + whole) // 2)
    settle(story)
    assert serving(story)
    story.lose("b")
    story.wait(TAKEOVER_S + 1, "a")
    settle(story)
    assert story.state is State.DOWN


def test_they_are_given_back_beside_serving() -> None:
    story = three()
    story.lose("b")
    story.wait(TAKEOVER_S + 1, "a", "c")
    settle(story)
    story.took(AssignRequest)
    story.join("b", 1)
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "b", "c"]}
    assert serving(story)
    assert all(a.request.beside for a in story.took(AssignRequest)), "it was moved, not formed anew"


def test_they_are_given_back_the_hard_way_where_pages_cannot_be_copied() -> None:
    story = three()
    story.lose("b")
    story.wait(TAKEOVER_S + 1, "a", "c")
    settle(story)
    other = {"b": "another layout"}
    story.join("b", 1, tp=2)
    for _ in range(20):
        settle(story, layouts=other)
        story.wait(1.0, "a", "b", "c")
    assert stages(story) == {"pipeline-0": ["a", "b", "c"]}
    assert serving(story)


def test_a_loss_among_the_survivors_is_survived() -> None:
    story = three()
    story.lose("b")
    story.wait(TAKEOVER_S + 1, "a", "c")
    settle(story)
    story.lose("a")
    story.wait(TAKEOVER_S + 1, "c")
    settle(story)
    assert stages(story) == {"pipeline-0": ["c"]}


def taken_over() -> Story:
    """Three stages of which one is lost for good: two workers have taken its layers over."""
    story = three()
    story.lose("b")
    story.wait(TAKEOVER_S + 1, "a", "c")
    settle(story)
    assert stages(story) == {"pipeline-0": ["a", "c"]}
    return story


@pytest.mark.parametrize("how", ["a link", "a rank", "steps", "a lease"])
def test_fewer_stages_that_are_interrupted_form_again_over_who_is_left(how: str) -> None:
    """As often as needed, at once, and with every layer once."""
    story = taken_over()
    for _ in range(3):
        before = story.epoch
        if how == "a link":
            story.send(broken("a", story.lives["a"], "pipeline-0", before, "reset"))
        elif how == "steps":
            story.send(stuck("pipeline-0", before, "no step came back"))
        else:
            story.lose("c")
            story.join("c", 2)
        story.wait(2.5, "a", "c")
        settle(story)
        assert serving(story), story.reason
        assert (stages(story), story.epoch > before) == ({"pipeline-0": ["a", "c"]}, True)
        assert ranges(story) == [(0, 3), (3, LAYERS)]


def test_two_losses_one_after_the_other_leave_no_empty_stage() -> None:
    story = taken_over()
    story.lose("a")
    story.send(events.Tick())
    settle(story)
    assert story.state is State.DOWN, "it may come back"
    story.wait(TAKEOVER_S + 1, "c")
    settle(story)
    assert (stages(story), ranges(story)) == ({"pipeline-0": ["c"]}, [(0, LAYERS)])
    story.send(broken("c", story.lives["c"], "pipeline-0", story.epoch, "reset"))
    story.wait(2.5, "c")
    settle(story)
    assert serving(story)
    assert ranges(story) == [(0, LAYERS)]


def test_what_never_served_waits_for_its_workers() -> None:
    story = Story(target(3, takeover_s=TAKEOVER_S))
    story.gateway()
    story.join("a", 0)
    story.wait(3 * TAKEOVER_S, "a")
    assert story.state is State.DOWN
    assert not story.took(AssignRequest)


def test_another_pipeline_that_serves_is_enough() -> None:
    story = Story(target(2, takeover_s=TAKEOVER_S))
    story.gateway()
    for name, pool in (("a", 0), ("b", 1), ("b2", 1)):
        story.join(name, pool)
    settle(story)
    story.lose("b2")
    story.wait(TAKEOVER_S + 1, "a", "b")
    settle(story)
    assert stages(story)["pipeline-0"] == ["a", "b"]
    assert story.pipelines["pipeline-1"].state is State.DOWN


def replicas_lost_and_taken_over() -> Story:
    """Two pipelines shared `b`; the replicas of stage 0 are gone, and it has taken their layers over."""
    story = Story(target(2, takeover_s=1.0))
    story.gateway()
    story.join("a", 0), story.join("b")
    settle(story)
    story.join("a2", 0)
    settle(story)
    story.lose("a"), story.lose("a2")
    settle(story)
    story.wait(1.5, "b")
    settle(story)
    assert stages(story)["pipeline-0"] == ["b"]
    return story


def test_no_second_pipeline_is_made_before_the_first_has_all_its_stages() -> None:
    story = replicas_lost_and_taken_over()
    story.wait(4, "b")
    story.join("a", 0)
    story.prepared("a"), story.prepared("b")
    story.join("a2", 0)
    move = story.moves["pipeline-0"]
    story.send(events.Failed(order("link", "pipeline-0", move.epoch, 0), "not answered"))
    assert stages(story) == {"pipeline-0": ["b"], "pipeline-1": []}
    for _ in range(20):
        settle(story)
        story.wait(1, *story.world.workers)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b"]}


def test_a_second_pipeline_is_tried_again_when_the_first_is_whole() -> None:
    story = replicas_lost_and_taken_over()
    story.send(stuck("pipeline-0", story.epoch, "no step came back"))
    story.join("a", 0), story.join("a2", 0)
    for _ in range(20):
        settle(story)
        story.wait(1, *story.world.workers)
    assert stages(story) == {"pipeline-0": ["a", "b"], "pipeline-1": ["a2", "b"]}
    assert shares(story) == [2, 2]
