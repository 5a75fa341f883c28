"""A pipeline whose layers change hands while it serves."""

from __future__ import annotations

import pytest
from mesh_world import REVISION, World, serving, target

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.cost import Kind
from stagemesh.coordinator.moving import GONE_S, pages_to_copy
from stagemesh.coordinator.pipeline import State
from stagemesh.errors import ConfigError


def plans(*ranges: v.Range, names: str = "abc") -> list[v.StagePlan]:
    return [v.StagePlan(i, name, 1, r, 0) for i, (name, r) in enumerate(zip(names, ranges, strict=False))]


class TestPagesToCopy:
    def test_of_a_stage_that_goes_to_another_worker(self) -> None:
        found = pages_to_copy(plans((0, 3), (3, 6)), plans((0, 3), (3, 6), names="ax"), 7)
        assert found == (v.Copy(0, 7, 1, 1, (3, 6)),)

    def test_of_layers_that_go_to_a_neighbour(self) -> None:
        assert pages_to_copy(plans((0, 3), (3, 6)), plans((0, 4), (4, 6)), 7) == (v.Copy(0, 7, 1, 0, (3, 4)),)

    def test_from_several_to_one_and_from_one_to_several(self) -> None:
        old, new = plans((0, 2), (2, 4), (4, 6)), plans((0, 1), (1, 5), (5, 6))
        assert [(c.from_stage, c.to_stage, c.layers) for c in pages_to_copy(old, new, 7)] == [
            (0, 1, (1, 2)),
            (2, 1, (4, 5)),
        ]
        assert [(c.from_stage, c.to_stage, c.layers) for c in pages_to_copy(new, old, 7)] == [
            (1, 0, (1, 2)),
            (1, 2, (4, 5)),
        ]


def restarted(world: World) -> World:
    """Another coordinator, with what this one has written down, and the workers as they are."""
    pipeline, move = world.mesh.pipelines["pipeline-0"], world.mesh.moves.get("pipeline-0")
    assert world.plan is not None
    new = World(
        epochs={"pipeline-0": move.epoch if move is not None else world.epoch},
        plans={"pipeline-0": world.plan},
        **world.written,
    )
    new.lives, new.plan = world.lives, world.plan
    move_is_active = move is not None and move.published
    for name in sorted(world.mesh.workers):
        held = tuple(
            v.Held("pipeline-0", at.epoch, p.stage, p.layers, p.generation, at is pipeline or move_is_active, REVISION)
            for at in (pipeline, move)
            if at is not None
            for p in at.stages
            if p.worker_id == name
        )
        new.join(name, same_life=True, held=held)
    return new


def repartitioned() -> World:
    """Two stages of three layers, told to become four and two, with a gateway."""
    world = serving()
    world.gateway()
    world.send(events.RepartitionRequested(((0, 4), (4, 6))))
    return world


class TestRepartition:
    def test_members_load_what_they_lack_beside_serving_then_gateways_go_over(self) -> None:
        world = repartitioned()
        before = world.epoch
        assert [(p.worker_id, p.layers) for p in world.took(actions.Prepare)] == [("a", (0, 4)), ("b", (4, 6))]
        world.prepared("a")
        assert "pipeline-0" not in world.mesh.moves, "not before all have loaded"
        world.prepared("b")
        assigned = world.took(actions.Assign)
        assert [(a.plan.worker_id, a.plan.layers, a.epoch, a.beside) for a in assigned] == [
            ("a", (0, 4), before + 1, True),
            ("b", (4, 6), before + 1, True),
        ]
        world.prepare_move()
        assert (world.epoch, world.ranges, world.state) == (before, [(0, 3), (3, 6)], State.SERVING)
        world.wait(5, "a", "b")
        assert world.epoch == before, "it waits for its gateway"
        world.actions.clear()
        world.moved()
        assert (world.epoch, world.ranges, world.state) == (before + 1, [(0, 4), (4, 6)], State.SERVING)
        assert [(r.worker_id, r.epoch) for r in world.took(actions.Release)] == [("a", before), ("b", before)]

    def test_a_pipeline_that_is_lost_afterwards_keeps_the_ranges(self) -> None:
        world = repartitioned()
        world.prepared("a"), world.prepared("b")
        world.took(actions.Assign)
        world.prepare_move()
        world.moved()
        world.lose("b")
        world.join("b")
        assert world.ranges == [(0, 4), (4, 6)]

    def test_ranges_that_do_not_fit_are_refused(self) -> None:
        world = serving()
        with pytest.raises(ConfigError, match="adds up to 7 layers, the model has 6"):
            world.mesh.ranges_for([4, 3])
        with pytest.raises(ConfigError, match="names 3 stages"):
            world.mesh.ranges_for([2, 2, 2])
        assert world.mesh.ranges_for([]) == ((0, 3), (3, 6))

    def test_a_worker_that_cannot_load_them_changes_nothing(self) -> None:
        world = repartitioned()
        before = world.epoch
        world.prepared("a", failed="no memory")
        world.prepared("b")
        world.wait(10, "a", "b")
        assert (world.epoch, world.ranges, world.state) == (before, [(0, 3), (3, 6)], State.SERVING)
        assert world.mesh.ranges is None


class TestWhatGoesWrong:
    def ready(self, *gateways: str) -> World:
        """Gateways have been told."""
        world = serving("spare")
        for name in gateways:
            world.gateway(name)
        world.prepared("spare")
        world.send(events.DrainRequested("a"))
        world.took(actions.Assign)
        world.prepare_move()
        world.actions.clear()
        return world

    def test_before_gateways_know_nothing_has_happened(self) -> None:
        world = serving("spare")
        world.prepared("spare")
        before = world.epoch
        world.send(events.DrainRequested("a"))
        world.actions.clear()
        world.lose("spare")
        assert (world.epoch, world.state, world.holders) == (before, State.DRAINING, ["a", "b"])
        released = world.took(actions.Release)
        assert [(r.worker_id, r.epoch, r.alone) for r in released] == [("b", before + 1, True)]

    def test_a_worker_whose_pages_are_laid_out_otherwise_takes_over_the_hard_way(self) -> None:
        world = serving("spare")
        world.prepared("spare")
        before = world.epoch
        world.send(events.DrainRequested("a"))
        world.took(actions.Assign)
        for _ in range(2):
            move = world.mesh.moves["pipeline-0"]
            for stage in range(2):
                loaded = v.Loaded(4, 10, 20, world.mesh.target.fingerprint, "otherwise")
                world.send(events.AssignDone("pipeline-0", move.epoch, stage, loaded))
            world.wait(2.5, "a", "b", "spare")
        assert (world.state, world.holders) == (State.FORMING, ["spare", "b"])
        assert world.epoch > before + 2, "no epoch is used twice"

    def test_gateways_that_stay_have_lost_nothing(self) -> None:
        world = self.ready("g", "h")
        before = world.epoch
        world.moved("g", error="the pages did not come")
        assert "pipeline-0" in world.mesh.moves
        world.moved("h", error="nor here")
        assert "pipeline-0" not in world.mesh.moves
        assert (world.epoch, world.state, world.holders) == (before, State.SERVING, ["a", "b"])

    def test_where_one_has_gone_and_another_has_not_all_meet_at_a_later_epoch(self) -> None:
        world = self.ready("g", "h")
        before = world.epoch
        world.moved("g")
        world.moved("h", error="the pages did not come")
        assert (world.state, world.holders) == (State.FORMING, ["spare", "b"])
        assert world.epoch == before + 2

    def test_a_worker_lost_when_gateways_know_waits_for_their_word(self) -> None:
        world = self.ready("g")
        before = world.epoch
        world.lose("spare")
        assert world.epoch == before
        world.moved("g", error="a link broke")
        assert (world.epoch, world.holders) == (before, ["a", "b"])

    def test_a_worker_that_drains_when_gateways_know_is_left_by_a_move_of_its_own(self) -> None:
        world = self.ready("g")
        before = world.epoch
        world.join("another")
        world.send(events.DrainRequested("spare"))
        world.moved("g")
        assert (world.state, world.epoch, world.holders) == (State.SERVING, before + 1, ["spare", "b"])
        world.prepared("another")
        world.prepare_move()
        world.moved("g")
        assert (world.state, world.holders) == (State.SERVING, ["another", "b"])

    def test_a_gateway_that_says_nothing_is_not_waited_for_for_ever(self) -> None:
        world = self.ready("g")
        before = world.epoch
        world.wait(61, "a", "b", "spare")
        assert world.epoch > before + 1

    def test_a_gateway_that_goes_is_not_waited_for(self) -> None:
        world = self.ready("g")
        before = world.epoch
        world.send(events.GatewayGone("g"))
        world.wait(1, "a", "b", "spare")
        assert world.epoch == before, "it may come back"
        world.wait(1.5, "a", "b", "spare")
        assert (world.epoch, world.holders) == (before + 1, ["spare", "b"])

    def test_a_loss_of_the_pipeline_ends_the_move(self) -> None:
        world = self.ready("g")
        before = world.epoch
        world.lose("b")
        assert "pipeline-0" not in world.mesh.moves
        world.join("b")
        assert world.epoch > before + 1
        world.send(events.GatewayMoved("g", "pipeline-0", before + 1))
        assert world.state is State.FORMING, "late news"

    def test_other_ranges_that_a_gateway_cannot_follow_are_given_up(self) -> None:
        world = repartitioned()
        world.gateway("h")
        world.prepared("a"), world.prepared("b")
        epochs = set()
        for _ in range(4):
            if "pipeline-0" not in world.mesh.moves:
                break
            world.took(actions.Assign)
            world.prepare_move()
            epochs.add(world.mesh.moves["pipeline-0"].epoch)
            world.moved("g")
            world.moved("h", error="the pages do not come")
            world.wait(3, "a", "b")
            world.serve()
            world.wait(3, "a", "b")
            for name in "ab":
                if world.mesh.workers[name].preparing:
                    world.prepared(name)
        assert len(epochs) == 2, "it is tried twice, and not for ever"
        assert (world.mesh.ranges, world.ranges, world.state) == (None, [(0, 3), (3, 6)], State.SERVING)
        assert "moves failed" in world.mesh.given_up
        assert world.mesh.target.layer_partition is None, "what is formed later is not bound to them"

    def test_layers_that_fail_to_load_again_and_again_are_given_up(self) -> None:
        world = repartitioned()
        for _ in range(3):
            world.prepared("a", failed="no memory just now", final=False)
            world.wait(2.5, "a", "b")
        assert world.mesh.ranges is None
        assert "no memory just now" in world.mesh.given_up

    def test_what_a_move_left_behind_at_a_restart_is_released_everywhere(self) -> None:
        world = repartitioned()
        world.prepared("a"), world.prepared("b")
        move = world.mesh.moves["pipeline-0"]
        new = restarted(world)
        assert (new.state, new.epoch, new.ranges) == (State.SERVING, world.epoch, [(0, 3), (3, 6)])
        released = [(r.worker_id, r.epoch, r.alone) for r in new.took(actions.Release)]
        assert {("a", move.epoch, True), ("b", move.epoch, True)} <= set(released)
        assert not [r for r in released if r[1] == world.epoch]


class TestRestartWithinAMove:
    """Gateways have been told, and a coordinator that comes then does not know which have gone over."""

    def told(self) -> World:
        world = repartitioned()
        world.prepared("a"), world.prepared("b")
        world.prepare_move()
        return world

    def test_it_is_gone_on_with(self) -> None:
        world = self.told()
        following = world.mesh.moves["pipeline-0"].epoch
        new = restarted(world)
        assert (new.state, new.epoch, new.ranges) == (State.SERVING, world.epoch, [(0, 3), (3, 6)])
        assert [r for r in new.took(actions.Release) if r.epoch == following] == []
        new.gateway()
        new.moved()
        new.wait(GONE_S + 0.1, "a", "b")
        assert (new.state, new.epoch, new.ranges) == (State.SERVING, following, [(0, 4), (4, 6)])
        assert restarted(new).epoch == following

    def test_where_a_worker_of_it_is_gone_no_earlier_epoch_serves(self) -> None:
        world = serving("spare")
        world.gateway()
        world.prepared("spare")
        world.send(events.DrainRequested("a"))
        world.took(actions.Assign)
        world.prepare_move()
        following = world.mesh.moves["pipeline-0"].epoch
        world.lose("spare")
        new = restarted(world)
        new.wait(5, "a", "b")
        assert new.state is not State.SERVING
        new.join("another")
        assert new.epoch > following

    def test_where_it_fails_no_earlier_epoch_serves(self) -> None:
        world = self.told()
        following = world.mesh.moves["pipeline-0"].epoch
        new = restarted(world)
        new.gateway()
        new.moved(error="the pages did not come")
        new.wait(GONE_S + 0.1, "a", "b")
        assert new.epoch > following, "another gateway may have gone over"

    @pytest.mark.parametrize("ahead", [1, 500])
    def test_a_gateway_that_was_at_a_later_epoch_is_not_sent_back(self, ahead: int) -> None:
        """The coordinator's state may be lost, and that of all workers."""
        world = serving()
        world.gateway()
        driven = world.epoch + ahead
        world.send(events.GatewayMoved("g", "pipeline-0", driven))
        assert (world.state, world.epoch) == (State.FORMING, driven + 1)
        assert actions.PersistEpoch("pipeline-0", driven) in world.actions

    def test_one_that_all_gateways_have_stayed_from_is_not_taken_up(self) -> None:
        world = self.told()
        world.moved(error="the pages did not come")
        new = restarted(world)
        assert (new.state, new.epoch, new.mesh.moves) == (State.SERVING, world.epoch, {})


class TestRestart:
    """Whatever an operator asked for is known to a coordinator that is started again."""

    def test_ranges_that_are_wanted_still_are(self) -> None:
        world = repartitioned()
        world.prepared("a"), world.prepared("b")
        new = restarted(world)
        assert (new.state, new.ranges) == (State.SERVING, [(0, 3), (3, 6)])
        new.gateway()
        new.prepared("a"), new.prepared("b")
        new.prepare_move()
        new.moved()
        new.wait(GONE_S + 0.1, "a", "b")
        assert (new.state, new.ranges) == (State.SERVING, [(0, 4), (4, 6)])
        assert new.mesh.ranges is None

    def test_a_move_is_not_over_before_gateways_of_before_have_come_back(self) -> None:
        world = repartitioned()
        new = restarted(world)
        new.prepared("a"), new.prepared("b")
        new.prepare_move()
        new.wait(GONE_S / 2, "a", "b")
        assert (new.epoch, new.ranges) == (world.epoch, [(0, 3), (3, 6)]), "a gateway that drives it was not waited for"
        new.gateway()
        new.wait(GONE_S, "a", "b")
        assert new.epoch == world.epoch
        new.moved()
        assert new.ranges == [(0, 4), (4, 6)]

    def test_ranges_that_stages_hold_stay_those_of_what_is_formed_later(self) -> None:
        world = repartitioned()
        world.prepared("a"), world.prepared("b")
        world.prepare_move()
        world.moved()
        new = restarted(world)
        assert (new.ranges, new.mesh.moves) == ([(0, 4), (4, 6)], {})
        new.lose("a")
        new.join("a")
        assert new.ranges == [(0, 4), (4, 6)]

    def test_ranges_that_were_given_up_are_not_wanted_again(self) -> None:
        world = repartitioned()
        for _ in range(3):
            world.prepared("a", failed="no memory just now", final=False)
            world.wait(2.5, "a", "b")
        new = restarted(world)
        assert (new.mesh.ranges, new.mesh.target.layer_partition, new.mesh.moves) == (None, None, {})

    def test_a_worker_that_drains_still_does_and_its_next_life_does_not(self) -> None:
        world = serving("spare")
        world.gateway()
        world.send(events.DrainRequested("a"))
        new = restarted(world)
        assert new.mesh.workers["a"].draining
        new.gateway()
        new.prepared("spare")
        new.prepare_move()
        new.moved()
        new.wait(GONE_S + 0.1, *new.mesh.workers)
        assert new.holders == ["spare", "b"]
        again = restarted(new)
        assert again.mesh.workers["a"].draining, "it takes no stage until it is started again"
        again.join("a")
        assert not again.mesh.workers["a"].draining

    def test_ranges_that_no_worker_has_room_for_any_more_are_given_up(self) -> None:
        cost = target().cost
        small, whole = (cost.stage_memory(Kind(1, 0, 1e11, 1e10), *layers) for layers in ((0, 3), (0, 4)))
        world = World(wished=(4, 2))
        for name in "ab":
            world.join(name, memory_bytes=(small + whole) // 2)
        assert world.state is State.FORMING
        assert world.ranges == [(0, 3), (3, 6)]
        assert world.written["wished"] is None, "nor is a coordinator that comes later to want them"
        assert "cannot be had any more" in world.mesh.given_up
