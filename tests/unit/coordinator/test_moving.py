"""A pipeline whose layers change hands while it serves."""

from __future__ import annotations

import pytest
from mesh_world import TIMING, Story, drain, held, loaded, repartition, serving, switched, target

from stagemesh.coordinator import values as v
from stagemesh.coordinator.core.attempt import page_copies
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.policy.ranges import ranges_for
from stagemesh.coordinator.world.pipeline import Phase, State
from stagemesh.coordinator.world.record import Record
from stagemesh.errors import ConfigError
from stagemesh.planning.cost import Kind
from stagemesh.protos.v1.stage_pb2 import AssignRequest, PrepareRequest, ReleaseRequest
from stagemesh.protos.v1.types_pb2 import KvCopy


def plans(*ranges: v.Range, names: str = "abc") -> list[v.StagePlan]:
    return [v.StagePlan(i, name, 1, r, 0) for i, (name, r) in enumerate(zip(names, ranges, strict=False))]


def copy(index: int, epoch: int, source: int, to: int, layers: v.Range) -> KvCopy:
    return KvCopy(index=index, from_epoch=epoch, from_stage=source, to_stage=to, layers=v.layer_range(layers))


class TestPagesToCopy:
    def test_of_a_stage_that_goes_to_another_worker(self) -> None:
        found = page_copies(plans((0, 3), (3, 6)), plans((0, 3), (3, 6), names="ax"), 7)
        assert found == (copy(0, 7, 1, 1, (3, 6)),)

    def test_of_layers_that_go_to_a_neighbour(self) -> None:
        assert page_copies(plans((0, 3), (3, 6)), plans((0, 4), (4, 6)), 7) == (copy(0, 7, 1, 0, (3, 4)),)

    def test_from_several_to_one_and_from_one_to_several(self) -> None:
        old, new = plans((0, 2), (2, 4), (4, 6)), plans((0, 1), (1, 5), (5, 6))
        assert [(c.from_stage, c.to_stage, v.span(c.layers)) for c in page_copies(old, new, 7)] == [
            (0, 1, (1, 2)),
            (2, 1, (4, 5)),
        ]
        assert [(c.from_stage, c.to_stage, v.span(c.layers)) for c in page_copies(new, old, 7)] == [
            (1, 0, (1, 2)),
            (1, 2, (4, 5)),
        ]


def restarted(story: Story) -> Story:
    """Another coordinator, with what this one has written down, and the workers as they are."""
    new = Story(record=story.written.copy())
    new.lives = story.lives
    active = [a for a in story.pipeline.attempts if a.phase in (Phase.ACTIVE, Phase.SWITCH)]
    for name in sorted(story.world.workers):
        holds = tuple(
            held("pipeline-0", at.epoch, p, active=at in active)
            for at in story.pipeline.attempts
            for p in at.stages
            if p.worker_id == name
        )
        new.join(name, same_life=True, held=holds)
    return new


def repartitioned() -> Story:
    """Two stages of three layers, told to become four and two, with a gateway."""
    story = serving()
    story.gateway()
    story.send(repartition(4, 2))
    return story


class TestRepartition:
    def test_members_load_what_they_lack_beside_serving_then_gateways_go_over(self) -> None:
        story = repartitioned()
        before = story.epoch
        assert [(p.to.worker_id, v.span(p.request.layers)) for p in story.took(PrepareRequest)] == [
            ("a", (0, 4)),
            ("b", (4, 6)),
        ]
        story.prepared("a")
        assert "pipeline-0" not in story.moves, "not before all have loaded"
        story.prepared("b")
        assigned = story.took(AssignRequest)
        assert [
            (a.to.worker_id, v.span(a.request.layers), a.request.key.epoch, a.request.beside) for a in assigned
        ] == [
            ("a", (0, 4), before + 1, True),
            ("b", (4, 6), before + 1, True),
        ]
        story.prepare_move()
        assert (story.epoch, story.ranges, story.state) == (before, [(0, 3), (3, 6)], State.SERVING)
        story.wait(5, "a", "b")
        assert story.epoch == before, "it waits for its gateway"
        story.actions.clear()
        story.moved()
        assert (story.epoch, story.ranges, story.state) == (before + 1, [(0, 4), (4, 6)], State.SERVING)
        assert [(r.to.worker_id, r.request.key.epoch) for r in story.took(ReleaseRequest)] == [
            ("a", before),
            ("b", before),
        ]

    def test_a_pipeline_that_is_lost_afterwards_keeps_the_ranges(self) -> None:
        story = repartitioned()
        story.prepared("a"), story.prepared("b")
        story.took(AssignRequest)
        story.prepare_move()
        story.moved()
        story.lose("b")
        story.join("b")
        assert story.ranges == [(0, 4), (4, 6)]

    def test_ranges_that_do_not_fit_are_refused(self) -> None:
        story = serving()
        with pytest.raises(ConfigError, match="adds up to 7 layers, the model has 6"):
            ranges_for(story.world, [4, 3], story.now)
        with pytest.raises(ConfigError, match="names 3 stages"):
            ranges_for(story.world, [2, 2, 2], story.now)
        assert ranges_for(story.world, [], story.now) == ((0, 3), (3, 6))

    def test_a_worker_that_cannot_load_them_changes_nothing(self) -> None:
        story = repartitioned()
        before = story.epoch
        story.prepared("a", failed="no memory")
        story.prepared("b")
        story.wait(10, "a", "b")
        assert (story.epoch, story.ranges, story.state) == (before, [(0, 3), (3, 6)], State.SERVING)
        assert story.world.wanted_ranges is None


class TestWhatGoesWrong:
    def ready(self, *gateways: str) -> Story:
        """Gateways have been told."""
        story = serving("spare")
        for name in gateways:
            story.gateway(name)
        story.prepared("spare")
        story.send(drain("a"))
        story.took(AssignRequest)
        story.prepare_move()
        story.actions.clear()
        return story

    def test_before_gateways_know_nothing_has_happened(self) -> None:
        story = serving("spare")
        story.prepared("spare")
        before = story.epoch
        story.send(drain("a"))
        story.actions.clear()
        story.lose("spare")
        assert (story.epoch, story.state, story.holders) == (before, State.DRAINING, ["a", "b"])
        released = story.took(ReleaseRequest)
        assert [(r.to.worker_id, r.request.key.epoch, r.request.alone) for r in released] == [("b", before + 1, True)]

    def test_a_worker_whose_pages_are_laid_out_otherwise_takes_over_the_hard_way(self) -> None:
        story = serving("spare")
        story.prepared("spare")
        before = story.epoch
        story.send(drain("a"))
        story.took(AssignRequest)
        for _ in range(2):
            move = story.moves["pipeline-0"]
            for stage in range(2):
                story.send(loaded("pipeline-0", move.epoch, stage, layout="otherwise"))
            story.wait(2.5, "a", "b", "spare")
        assert (story.state, story.holders) == (State.FORMING, ["spare", "b"])
        assert story.epoch > before + 2, "no epoch is used twice"

    def test_a_worker_of_another_number_of_ranks_takes_over_the_hard_way_at_once(self) -> None:
        story = serving()
        story.join("spare", tp=2)
        story.wait(TIMING.settled_s, *story.world.workers)
        story.prepared("spare")
        before = story.epoch
        story.send(drain("a"))
        assert "pipeline-0" not in story.moves
        assert (story.state, story.holders, story.epoch) == (State.FORMING, ["spare", "b"], before + 1)

    def test_gateways_that_stay_have_lost_nothing(self) -> None:
        story = self.ready("g", "h")
        before = story.epoch
        story.moved("g", error="the pages did not come")
        assert "pipeline-0" in story.moves
        story.moved("h", error="nor here")
        assert "pipeline-0" not in story.moves
        assert (story.epoch, story.state, story.holders) == (before, State.SERVING, ["a", "b"])

    def test_where_one_has_gone_and_another_has_not_all_meet_at_a_later_epoch(self) -> None:
        story = self.ready("g", "h")
        before = story.epoch
        story.moved("g")
        story.moved("h", error="the pages did not come")
        assert (story.state, story.holders) == (State.FORMING, ["spare", "b"])
        assert story.epoch == before + 2

    def test_a_worker_lost_when_gateways_know_waits_for_their_word(self) -> None:
        story = self.ready("g")
        before = story.epoch
        story.lose("spare")
        assert story.epoch == before
        story.moved("g", error="a link broke")
        assert (story.epoch, story.holders) == (before, ["a", "b"])

    def test_a_worker_that_drains_when_gateways_know_is_left_by_a_move_of_its_own(self) -> None:
        story = self.ready("g")
        before = story.epoch
        story.join("another")
        story.send(drain("spare"))
        story.moved("g")
        assert (story.state, story.epoch, story.holders) == (State.SERVING, before + 1, ["spare", "b"])
        story.prepared("another")
        story.prepare_move()
        story.moved("g")
        assert (story.state, story.holders) == (State.SERVING, ["another", "b"])

    def test_a_gateway_that_says_nothing_is_not_waited_for_for_ever(self) -> None:
        story = self.ready("g")
        before = story.epoch
        story.wait(61, "a", "b", "spare")
        assert story.epoch > before + 1

    def test_a_gateway_that_goes_is_not_waited_for(self) -> None:
        story = self.ready("g")
        before = story.epoch
        story.send(events.GatewayGone("g"))
        story.wait(1, "a", "b", "spare")
        assert story.epoch == before, "it may come back"
        story.wait(1.5, "a", "b", "spare")
        assert (story.epoch, story.holders) == (before + 1, ["spare", "b"])

    def test_a_loss_of_the_pipeline_ends_the_move(self) -> None:
        story = self.ready("g")
        before = story.epoch
        story.lose("b")
        assert "pipeline-0" not in story.moves
        story.join("b")
        assert story.epoch > before + 1
        story.send(switched("g", "pipeline-0", before + 1))
        assert story.state is State.FORMING, "late news"

    def test_other_ranges_that_a_gateway_cannot_follow_are_given_up(self) -> None:
        story = repartitioned()
        story.gateway("h")
        story.prepared("a"), story.prepared("b")
        epochs = set()
        for _ in range(4):
            if "pipeline-0" not in story.moves:
                break
            story.took(AssignRequest)
            story.prepare_move()
            epochs.add(story.moves["pipeline-0"].epoch)
            story.moved("g")
            story.moved("h", error="the pages do not come")
            story.wait(3, "a", "b")
            story.serve()
            story.wait(3, "a", "b")
            for name in "ab":
                if story.world.workers[name].preparing:
                    story.prepared(name)
        assert len(epochs) == 2, "it is tried twice, and not for ever"
        assert (story.world.wanted_ranges, story.ranges, story.state) == (None, [(0, 3), (3, 6)], State.SERVING)
        assert "moves failed" in story.world.given_up
        assert story.world.target.layer_partition is None, "what is formed later is not bound to them"

    def test_layers_that_fail_to_load_again_and_again_are_given_up(self) -> None:
        story = repartitioned()
        for _ in range(3):
            story.prepared("a", failed="no memory just now", final=False)
            story.wait(2.5, "a", "b")
        assert story.world.wanted_ranges is None
        assert "no memory just now" in story.world.given_up

    def test_what_a_move_left_behind_at_a_restart_is_released_everywhere(self) -> None:
        story = repartitioned()
        story.prepared("a"), story.prepared("b")
        move = story.moves["pipeline-0"]
        new = restarted(story)
        assert (new.state, new.epoch, new.ranges) == (State.SERVING, story.epoch, [(0, 3), (3, 6)])
        released = [(r.to.worker_id, r.request.key.epoch, r.request.alone) for r in new.took(ReleaseRequest)]
        assert {("a", move.epoch, True), ("b", move.epoch, True)} <= set(released)
        assert not [r for r in released if r[1] == story.epoch]


class TestRestartWithinAMove:
    """Gateways have been told, and a coordinator that comes then does not know which have gone over."""

    def told(self) -> Story:
        story = repartitioned()
        story.prepared("a"), story.prepared("b")
        story.prepare_move()
        return story

    def test_it_is_gone_on_with(self) -> None:
        story = self.told()
        following = story.moves["pipeline-0"].epoch
        new = restarted(story)
        assert (new.state, new.epoch, new.ranges) == (State.SERVING, story.epoch, [(0, 3), (3, 6)])
        assert [r for r in new.took(ReleaseRequest) if r.request.key.epoch == following] == []
        new.gateway()
        new.moved()
        new.wait(TIMING.gone_s + 0.1, "a", "b")
        assert (new.state, new.epoch, new.ranges) == (State.SERVING, following, [(0, 4), (4, 6)])
        assert restarted(new).epoch == following

    def test_where_a_worker_of_it_is_gone_no_earlier_epoch_serves(self) -> None:
        story = serving("spare")
        story.gateway()
        story.prepared("spare")
        story.send(drain("a"))
        story.took(AssignRequest)
        story.prepare_move()
        following = story.moves["pipeline-0"].epoch
        story.lose("spare")
        new = restarted(story)
        new.wait(5, "a", "b")
        assert new.state is not State.SERVING
        new.join("another")
        assert new.epoch > following

    def test_where_it_fails_no_earlier_epoch_serves(self) -> None:
        story = self.told()
        following = story.moves["pipeline-0"].epoch
        new = restarted(story)
        new.gateway()
        new.moved(error="the pages did not come")
        new.wait(TIMING.gone_s + 0.1, "a", "b")
        assert new.epoch > following, "another gateway may have gone over"

    @pytest.mark.parametrize("ahead", [1, 500])
    def test_a_gateway_that_was_at_a_later_epoch_is_not_sent_back(self, ahead: int) -> None:
        """The coordinator's state may be lost, and that of all workers."""
        story = serving()
        story.gateway()
        driven = story.epoch + ahead
        story.send(switched("g", "pipeline-0", driven))
        assert (story.state, story.epoch) == (State.FORMING, driven + 1)
        assert story.written.epochs["pipeline-0"] > driven

    def test_one_that_all_gateways_have_stayed_from_is_not_taken_up(self) -> None:
        story = self.told()
        story.moved(error="the pages did not come")
        new = restarted(story)
        assert (new.state, new.epoch, new.moves) == (State.SERVING, story.epoch, {})


class TestRestart:
    """Whatever an operator asked for is known to a coordinator that is started again."""

    def test_ranges_that_are_wanted_still_are(self) -> None:
        story = repartitioned()
        story.prepared("a"), story.prepared("b")
        new = restarted(story)
        assert (new.state, new.ranges) == (State.SERVING, [(0, 3), (3, 6)])
        new.gateway()
        new.prepared("a"), new.prepared("b")
        new.prepare_move()
        new.moved()
        new.wait(TIMING.gone_s + 0.1, "a", "b")
        assert (new.state, new.ranges) == (State.SERVING, [(0, 4), (4, 6)])
        assert new.world.wanted_ranges is None

    def test_a_move_is_not_over_before_gateways_of_before_have_come_back(self) -> None:
        story = repartitioned()
        new = restarted(story)
        new.prepared("a"), new.prepared("b")
        new.prepare_move()
        new.wait(TIMING.gone_s / 2, "a", "b")
        assert (new.epoch, new.ranges) == (story.epoch, [(0, 3), (3, 6)]), "a gateway that drives it was not waited for"
        new.gateway()
        new.wait(TIMING.gone_s, "a", "b")
        assert new.epoch == story.epoch
        new.moved()
        assert new.ranges == [(0, 4), (4, 6)]

    def test_ranges_that_stages_hold_stay_those_of_what_is_formed_later(self) -> None:
        story = repartitioned()
        story.prepared("a"), story.prepared("b")
        story.prepare_move()
        story.moved()
        new = restarted(story)
        assert (new.ranges, new.moves) == ([(0, 4), (4, 6)], {})
        new.lose("a")
        new.join("a")
        assert new.ranges == [(0, 4), (4, 6)]

    def test_ranges_that_were_given_up_are_not_wanted_again(self) -> None:
        story = repartitioned()
        for _ in range(3):
            story.prepared("a", failed="no memory just now", final=False)
            story.wait(2.5, "a", "b")
        new = restarted(story)
        assert (new.world.wanted_ranges, new.world.target.layer_partition, new.moves) == (None, None, {})

    def test_a_worker_that_drains_still_does_and_its_next_life_does_not(self) -> None:
        story = serving("spare")
        story.gateway()
        story.send(drain("a"))
        new = restarted(story)
        assert new.world.drains(new.world.workers["a"])
        new.gateway()
        new.prepared("spare")
        new.prepare_move()
        new.moved()
        new.wait(TIMING.gone_s + 0.1, *new.world.workers)
        assert new.holders == ["spare", "b"]
        again = restarted(new)
        assert again.world.drains(again.world.workers["a"]), "it takes no stage until it is started again"
        again.join("a")
        assert not again.world.drains(again.world.workers["a"])

    def test_ranges_that_no_worker_has_room_for_any_more_are_given_up(self) -> None:
        cost = target().cost
        small, whole = (cost.stage_memory(Kind(1, 0, 1e11, 1e10), *layers) for layers in ((0, 3), (0, 4)))
        story = Story(record=Record(counts=(4, 2)))
        for name in "ab":
            story.join(name, memory_bytes=int(small + whole) // 2)
        assert story.state is State.FORMING
        assert story.ranges == [(0, 3), (3, 6)]
        assert story.written.counts is None, "nor is a coordinator that comes later to want them"
        assert "cannot be had any more" in story.world.given_up
