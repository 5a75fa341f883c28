"""The coordinator's core, one story a test: forming, losing, failing, draining, restarting."""

from __future__ import annotations

import pytest
from mesh_world import BOTH, LEASE_S, REVISION, World, serving, target

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.forming import REFUSED_S
from stagemesh.coordinator.pipeline import State
from stagemesh.coordinator.standbys import REFILLED_S


class TestForming:
    def test_waits_until_every_stage_has_a_worker(self) -> None:
        world = World()
        world.join("a")
        assert (world.state, world.took(actions.Assign)) == (State.DOWN, [])
        assert "stage 1 has no worker" in world.reason
        assert not world.final
        world.join("b")
        assert world.state is State.FORMING
        assert [(a.plan.worker_id, a.plan.layers, a.address) for a in world.took(actions.Assign)] == [
            ("a", (0, 3), "a:1"),
            ("b", (3, 6), "b:1"),
        ]

    def test_assign_then_links_then_activate_then_publish(self) -> None:
        world = World(target(3))
        for name in "abc":
            world.join(name)
        world.took(actions.Assign)
        world.load(0), world.load(2)
        assert world.took(actions.MakeLink) == []
        world.load(1)
        assert [(m.stage, m.transport, m.receiver_id) for m in world.took(actions.MakeLink)] == [
            (0, "ucx", "b"),
            (1, "ucx", "c"),
            (2, "ucx", "a"),
        ]
        world.link(1)
        assert world.took(actions.Activate) == []
        world.link(0)
        assert [a.stage for a in world.took(actions.Activate)] == [0, 1, 2]
        world.ack(0), world.ack(2)
        assert world.state is State.FORMING
        world.ack(1)
        assert (world.state, world.reason) == (State.SERVING, "")

    def test_the_epoch_is_written_down_before_anyone_hears_of_it_and_the_plan_before_it_is_published(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        kinds = [type(a) for a in world.actions]
        assert kinds.index(actions.PersistEpoch) < kinds.index(actions.Assign)
        world.load(0), world.load(1), world.link(0), world.ack(0)
        world.actions.clear()
        world.ack(1)
        kinds = [type(a) for a in world.actions]
        assert kinds.index(actions.PersistPlan) < kinds.index(actions.Publish)

    def test_one_stage_needs_no_link(self) -> None:
        world = World(target(1))
        world.join("a")
        world.load(0)
        assert [a.stage for a in world.took(actions.Activate)] == [0]
        world.ack(0)
        assert world.state is State.SERVING

    def test_a_link_to_more_ranks_has_a_nonce_for_each_receiving_rank(self) -> None:
        world = World()
        world.join("a", 0, tp=2), world.join("b", 1, tp=4)
        world.load(0), world.load(1)
        link, tokens = world.took(actions.MakeLink)
        assert len(set(link.nonces)) == 4
        assert all(0 < nonce < 1 << 32 for nonce in link.nonces)
        assert (link.tokens, link.receiver_stage) == (False, 1)
        assert (tokens.tokens, tokens.receiver_stage, len(tokens.nonces)) == (True, 0, 1)
        assert link.sender_rank_addresses == (b"u", b"u") or len(link.sender_rank_addresses) == 2

    def test_progress_is_published_without_haste(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        world.actions.clear()
        world.send(events.AssignProgress("pipeline-0", world.epoch, 1, 5, 10))
        assert world.took(actions.Publish) == [actions.Publish(urgent=False)]
        assert world.mesh.workers["b"].progress == v.Progress(5, 10)

    def test_standbys_are_left_alone(self) -> None:
        world = serving("spare")
        assert world.holders == ["a", "b"]


class TestTransport:
    def form(self, wanted: str, first: tuple[str, ...], second: tuple[str, ...]) -> World:
        world = World(target(transport=wanted))
        for name, has in (("a", first), ("b", second)):
            world.join(name, transports=tuple((n, a) for n, a in BOTH if n in has))
        world.actions.clear()
        world.load(0), world.load(1)
        return world

    def test_auto_falls_back_with_a_warning_that_says_why(self) -> None:
        world = self.form("auto", ("tcp", "ucx"), ("tcp",))
        (warning,) = [a.message for a in world.actions if isinstance(a, actions.Log) and a.warning]
        assert "b did not open ucx" in warning
        assert [m.transport for m in world.took(actions.MakeLink)] == ["tcp"] * 2

    def test_tcp_when_asked_for_is_no_warning(self) -> None:
        world = self.form("tcp", ("tcp", "ucx"), ("tcp", "ucx"))
        assert not [a for a in world.actions if isinstance(a, actions.Log) and a.warning]
        assert [m.transport for m in world.took(actions.MakeLink)] == ["tcp"] * 2

    def test_ucx_asked_for_and_missing(self) -> None:
        world = self.form("ucx", ("tcp", "ucx"), ("tcp",))
        assert (world.state, world.final) == (State.DOWN, True)
        assert "b did not open it" in world.reason

    def test_nothing_in_common(self) -> None:
        world = self.form("auto", ("ucx",), ("tcp",))
        assert world.state is State.DOWN
        assert "no transport in common" in world.reason

    def test_auto_gives_ucx_up_between_two_workers_where_it_failed_twice(self) -> None:
        world = self.form("auto", ("tcp", "ucx"), ("tcp", "ucx"))
        for _ in range(2):
            assert [m.transport for m in world.took(actions.MakeLink)] == ["ucx"] * 2
            world.fail(0, "link", "handshake timed out", transport_failed=True)
            world.wait(2.5, "a", "b")
            world.load(0), world.load(1)
        assert any(
            "handshake timed out" in a.message for a in world.actions if isinstance(a, actions.Log) and a.warning
        )
        assert [m.transport for m in world.took(actions.MakeLink)] == ["tcp"] * 2


class TestLoss:
    def test_the_next_worker_takes_over_and_the_others_keep_their_layers(self) -> None:
        world = serving("spare")
        before = world.epoch
        world.lose("b")
        assert (world.state, world.epoch) == (State.FORMING, before + 1)
        assert [(a.plan.worker_id, a.plan.layers) for a in world.took(actions.Assign)] == [
            ("a", (0, 3)),
            ("spare", (3, 6)),
        ]
        world.serve()
        assert world.state is State.SERVING

    def test_without_another_the_pipeline_is_down_and_says_why(self) -> None:
        world = serving()
        before = world.epoch
        world.lose("b")
        assert (world.state, world.epoch, world.final) == (State.DOWN, before + 1, False)
        assert "stage 1: worker b is lost: its keep-alive stream ended" in world.reason
        assert [(r.worker_id, r.epoch) for r in world.took(actions.Release)] == [("a", before)]
        world.join("b")
        assert (world.state, world.epoch) == (State.FORMING, before + 2)

    def test_a_lease_that_runs_out(self) -> None:
        world = serving()
        world.wait(0.5, "a")
        assert world.state is State.SERVING
        world.wait(0.15, "a")
        assert world.state is State.DOWN
        assert "worker b is lost: its lease of 600 ms ran out" in world.reason
        assert not world.mesh.knows("b", 1)

    def test_nobody_is_lost_when_the_coordinator_itself_stood_still(self) -> None:
        world = serving()
        world.now += 30.0
        world.send(events.Tick())
        assert world.state is State.SERVING
        world.wait(0.7)
        assert world.state is State.DOWN

    def test_a_new_life_of_a_worker_is_a_loss_of_the_old_one(self) -> None:
        world = serving()
        before = world.epoch
        world.join("b")
        assert (world.state, world.epoch) == (State.FORMING, before + 1)
        assert world.mesh.pipelines["pipeline-0"].stages[1].incarnation == 2

    def test_the_end_of_an_old_life_is_no_news(self) -> None:
        world = serving()
        world.join("b")
        world.serve()
        world.send(events.WorkerLost("b", 1, "late"))
        assert world.state is State.SERVING

    def test_a_standby_that_goes_changes_nothing(self) -> None:
        world = serving("spare")
        before = world.epoch
        world.lose("spare")
        assert (world.state, world.epoch) == (State.SERVING, before)

    def test_a_worker_lost_while_forming(self) -> None:
        world = World()
        for name in ("a", "b", "spare"):
            world.join(name)
        first = world.epoch
        world.load(0)
        world.lose("b")
        assert world.holders == ["a", "spare"]
        world.load(1, epoch=first)  # late news of the attempt before
        assert world.mesh.pipelines["pipeline-0"].loaded == {}

    def test_orders_of_a_past_epoch_are_cancelled(self) -> None:
        world = serving("spare")
        world.lose("b")
        assert max(f.epoch for f in world.took(actions.Forget)) == world.epoch


class TestFailures:
    def test_a_passing_failure_is_tried_again_with_growing_pauses(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        pauses = []
        for _ in range(6):
            world.fail(1, "assign", "cannot be reached")
            assert (world.state, world.reason) == (State.FORMING, "stage 1: cannot be reached")
            before, at = world.epoch, world.now
            while world.epoch == before:
                world.wait(0.05, "a", "b")
            pauses.append(round(world.now - at, 1))
        assert pauses == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
        world.serve()
        assert world.state is State.SERVING

    def test_a_final_failure_is_not_tried_again_with_the_same_worker(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        world.actions.clear()
        world.fail(1, "assign", "tensor model.norm.weight is missing", final=True)
        assert (world.state, world.final) == (State.DOWN, True)
        assert "stage 1: worker b cannot assign: tensor model.norm.weight is missing" in world.reason
        before = world.epoch
        world.wait(10, "a", "b")
        assert (world.epoch, world.took(actions.Assign)) == (before, [])
        world.join("spare")
        assert [a.plan.worker_id for a in world.took(actions.Assign)] == ["a", "spare"]

    def test_a_new_life_of_the_worker_is_asked_again(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        world.fail(1, "assign", "no such file", final=True)
        world.join("b")
        assert world.holders == ["a", "b"]

    def test_another_revision_is_refused_and_all_are_named(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        world.load(0)
        world.load(1, revision="0123456789abcdef")
        assert (world.state, world.final) == (State.DOWN, True)
        for word in ("worker b", "0123456789ab", "the coordinator and a have", REVISION[:12]):
            assert word in world.reason

    def test_too_few_pages_for_one_sequence(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        world.load(0, pages=4)
        world.load(1, pages=3)
        assert world.state is State.DOWN
        for word in ("stage 1", "worker b", "3 KV pages of 16", "--max-model-len 64 needs 4", "--max-model-len 48"):
            assert word in world.reason

    def test_a_broken_link_waits_a_moment_for_the_neighbours_death(self) -> None:
        world = serving("spare")
        before = world.epoch
        world.send(events.LinkBroken("a", "pipeline-0", before, "peer reset"))
        assert (world.state, world.reason) == (State.FORMING, "stage 0: a link broke: peer reset")
        assert world.took(actions.Assign) == []
        world.lose("b")
        assert world.holders == ["a", "spare"]

    def test_a_broken_link_between_two_that_live_is_made_anew(self) -> None:
        world = serving()
        before = world.epoch
        world.send(events.LinkBroken("a", "pipeline-0", before, "peer reset"))
        world.wait(0.3, "a", "b")
        assert (world.epoch, world.holders) == (before + 1, ["a", "b"])
        world.send(events.LinkBroken("b", "pipeline-0", before, "late news"))
        world.serve()
        assert world.state is State.SERVING

    def test_a_model_that_does_not_fit(self) -> None:
        world = World()
        world.join("a", memory_bytes=10_000), world.join("b", memory_bytes=10_000)
        assert (world.state, world.final) == (State.DOWN, True)
        assert "does not fit 2 stages" in world.reason
        world.join("big", memory_bytes=10_000_000), world.join("bigger", memory_bytes=10_000_000)
        assert sorted(world.holders) == ["big", "bigger"]


class TestStandby:
    def told(self, world: World) -> dict[str, v.Range]:
        return {action.worker_id: action.layers for action in world.took(actions.Prepare)}

    def test_standbys_load_different_stages_once_everything_serves(self) -> None:
        world = World()
        for name in ("a", "b", "s1", "s2", "s3"):
            world.join(name)
        assert self.told(world) == {}
        world.serve()
        assert self.told(world) == {}, (
            "what a lost stage had may be being computed: on one machine that needs all cores"
        )
        world.wait(REFILLED_S + 0.1, *world.mesh.workers)
        assert self.told(world) == {"s1": (0, 3), "s2": (3, 6), "s3": (0, 3)}
        world.prepared("s2")
        world.lose("b")
        assert world.holders == ["a", "s2"], "the one that has the layers loaded"

    def test_one_that_is_bound_to_a_stage_loads_that_one(self) -> None:
        world = serving()
        world.join("bound", pool=1)
        assert self.told(world) == {"bound": (3, 6)}

    def test_what_it_cannot_load_it_is_not_asked_for_again(self) -> None:
        world = serving()
        world.join("spare")
        assert self.told(world) == {"spare": (0, 3)}
        world.prepared("spare", failed="no such file")
        assert self.told(world) == {"spare": (3, 6)}
        world.prepared("spare", revision="e" * 64)
        assert self.told(world) == {}
        world.wait(5, "a", "b", "spare")
        assert self.told(world) == {}
        assert "another revision" in world.mesh.workers["spare"].refusals[1, (3, 6)]

    def test_what_failed_for_the_moment_is_tried_again_a_little_later(self) -> None:
        world = serving()
        world.join("spare")
        assert self.told(world) == {"spare": (0, 3)}
        world.prepared("spare", failed="its ranks are being started", final=False)
        world.wait(1, "a", "b", "spare")
        assert self.told(world) == {}
        world.wait(2, "a", "b", "spare")
        assert self.told(world) == {"spare": (0, 3)}

    def test_an_answer_that_comes_after_it_was_given_a_stage_changes_nothing(self) -> None:
        world = serving("spare")
        life, layers = world.lives["spare"], world.mesh.workers["spare"].preparing
        assert layers == (0, 3)
        world.lose("b")
        assert world.holders == ["a", "spare"]
        world.send(events.Prepared("spare", life, layers, REVISION))
        assert world.mesh.workers["spare"].kept is None


class TestStuck:
    def test_a_gateway_whose_steps_do_not_come_back_has_the_links_made_anew(self) -> None:
        world = serving()
        before = world.epoch
        world.send(events.StepsStuck("g", "pipeline-0", before - 1, "late"))
        assert (world.state, world.epoch) == (State.SERVING, before)
        world.send(events.StepsStuck("g", "pipeline-0", before, "no step came back"))
        assert world.state is State.FORMING
        assert "gateway g: no step came back" in world.reason
        world.wait(0.3, "a", "b")
        assert (world.epoch, world.holders) == (before + 1, ["a", "b"])

    def test_two_that_do_not_reach_each_other_are_not_made_neighbours(self) -> None:
        world = serving("spare")
        world.send(events.StepsStuck("g", "pipeline-0", world.epoch, "no step came back"))
        world.wait(0.3, "a", "b", "spare")
        assert world.holders == ["a", "b"], "nobody knows yet what is to blame"
        world.load(0), world.load(1)
        world.fail(0, "link", "no handshake", transport_failed=True)
        world.wait(1, "a", "b", "spare")
        assert world.holders == ["a", "spare"]

    def test_one_that_a_gateway_does_not_reach_is_replaced(self) -> None:
        world = serving("spare")
        before = world.epoch
        world.send(events.StepsStuck("g", "pipeline-0", before, "no session", ("b",)))
        world.wait(0.3, "a", "b", "spare")
        assert (world.epoch, world.holders) == (before + 1, ["a", "spare"])

    def test_one_that_was_not_reached_is_chosen_again_later(self) -> None:
        """Also where no pipeline is formed meanwhile, which might have forgotten it."""
        world = serving("spare")
        world.send(events.StepsStuck("g", "pipeline-0", world.epoch, "no session", ("b",)))
        world.wait(0.3, "a", "b", "spare")
        world.serve()
        pipeline = world.mesh.pipelines["pipeline-0"]

        def best() -> list[str]:
            return [c.worker.info.worker_id for c in world.mesh._choose(pipeline, ())]

        assert best() == ["a", "spare"]
        world.wait(31, "a", "b", "spare")
        assert best() == ["a", "b"]

    @pytest.mark.parametrize(("spares", "unreachable"), [((), ("b",)), (("x", "y"), ("a", "b")), (("x",), ("b", "x"))])
    def test_nothing_is_changed_for_a_gateway_where_nobody_else_is_reached(
        self, spares: tuple[str, ...], unreachable: tuple[str, ...]
    ) -> None:
        """One that reaches none is itself cut off, and others may not be."""
        world = serving(*spares)
        before = world.epoch
        for _ in range(3):
            world.send(events.StepsStuck("g", "pipeline-0", before, "no session", unreachable))
            world.wait(0.3, "a", "b", *spares)
            assert (world.state, world.epoch, world.holders) == (State.SERVING, before, ["a", "b"])

    def test_without_another_they_go_on_trying(self) -> None:
        world = World()
        world.join("a"), world.join("b")
        world.load(0), world.load(1)
        world.fail(0, "link", "no handshake", transport_failed=True)
        world.wait(1, "a", "b")
        assert world.holders == ["a", "b"]


class TestDrain:
    def test_its_layers_move_when_another_worker_has_loaded_them(self) -> None:
        world = serving("spare")
        world.prepared("spare")
        before = world.epoch
        world.send(events.DrainRequested("b"))
        assert (world.state, world.epoch) == (State.SERVING, before), "what runs goes on, and new requests are taken"
        assert [(p.worker_id, p.layers) for p in world.took(actions.Prepare)] == [("spare", (3, 6))]
        world.prepared("spare")
        assert (world.holders, world.epoch, world.state) == (["a", "b"], before, State.SERVING), "it goes on meanwhile"
        world.prepare_move()
        assert (world.holders, world.epoch) == (["a", "spare"], before + 1)
        assert [(r.worker_id, r.epoch, r.alone) for r in world.took(actions.Release)] == [
            ("a", before, False),
            ("b", before, False),
        ]
        world.wait(5, "a", "b", "spare")
        assert (world.state, world.epoch) == (State.SERVING, before + 1)
        assert world.took(actions.Prepare) == [], "a worker that drains is no standby"

    def test_at_once_to_one_that_has_them(self) -> None:
        world = serving("spare")
        world.prepared("spare")
        world.send(events.DrainRequested("a"))
        world.prepare_move()
        assert world.holders == ["spare", "b"]

    def test_without_another_worker_nothing_new_is_taken_until_one_comes(self) -> None:
        world = serving()
        before = world.epoch
        world.send(events.DrainRequested("b"))
        assert (world.state, world.epoch) == (State.DRAINING, before)
        assert "stage 1: worker b drains" in world.reason
        world.wait(5, "a", "b")
        assert world.state is State.DRAINING
        world.join("late")
        assert (world.state, world.reason) == (State.SERVING, "")
        world.prepared("late")
        world.prepare_move()
        assert (world.holders, world.epoch) == (["a", "late"], before + 1)

    def test_one_that_goes_before_it_has_moved(self) -> None:
        world = serving("spare")
        before = world.epoch
        world.send(events.DrainRequested("b"))
        world.lose("b")
        assert (world.holders, world.epoch) == (["a", "spare"], before + 1)

    def test_another_that_cannot_load_them(self) -> None:
        world = serving("spare")
        world.prepared("spare")
        world.send(events.DrainRequested("b"))
        world.prepared("spare", failed="no memory")
        assert world.state is State.DRAINING
        assert world.holders == ["a", "b"]

    def test_a_draining_worker_gets_no_stage(self) -> None:
        world = World()
        world.join("a")
        world.send(events.DrainRequested("a"))
        world.join("b")
        assert world.state is State.DOWN
        world.join("c")
        assert sorted(world.holders) == ["b", "c"]

    def test_while_forming_the_others_go_on_without_it(self) -> None:
        world = World()
        for name in ("a", "b", "spare"):
            world.join(name)
        world.send(events.DrainRequested("a"))
        assert sorted(world.holders) == ["b", "spare"]


class TestRestart:
    def restart(self, old: World, **kwargs: object) -> World:
        """A coordinator that knows only what was written down."""
        plan = v.StoredPlan(
            "pipeline-0",
            old.epoch,
            old.mesh.pipelines["pipeline-0"].stages,
            tuple(old.mesh.pipelines["pipeline-0"].loaded[s] for s in range(2)),
            ("shared memory", ""),
            "terms",
        )
        new = World(epochs={"pipeline-0": old.epoch}, plans={"pipeline-0": plan}, **kwargs)
        new.lives = old.lives
        return new

    def held(self, world: World, name: str, *, active: bool = True) -> tuple[v.Held, ...]:
        return tuple(
            v.Held("pipeline-0", world.epoch, p.stage, p.layers, p.generation, active, REVISION)
            for p in world.mesh.pipelines["pipeline-0"].stages
            if p.worker_id == name
        )

    def test_a_pipeline_whose_workers_are_all_active_goes_on_unchanged(self) -> None:
        old = serving()
        new = self.restart(old)
        assert new.mesh.restoring
        new.join("a", same_life=True, held=self.held(old, "a"))
        assert new.mesh.restoring
        new.join("b", same_life=True, held=self.held(old, "b"))
        assert not new.mesh.restoring
        assert (new.state, new.epoch, new.holders) == (State.SERVING, old.epoch, ["a", "b"])
        assert new.took(actions.Assign) + new.took(actions.Release) == []
        assert new.mesh.pipelines["pipeline-0"].routes[0] == "shared memory"

    def test_one_that_does_not_come_back_is_waited_for_then_replaced(self) -> None:
        old = serving()
        new = self.restart(old)
        new.join("a", same_life=True, held=self.held(old, "a"))
        new.join("spare")
        new.wait(LEASE_S, "a", "spare")
        assert (new.state, new.took(actions.Assign)) == (State.DOWN, [])
        new.wait(2.0, "a", "spare")
        assert (new.epoch, new.holders) == (old.epoch + 1, ["a", "spare"])

    @pytest.mark.parametrize("how", ["new life", "not active", "holds nothing"])
    def test_one_that_lost_its_stage_ends_the_waiting(self, how: str) -> None:
        old = serving()
        new = self.restart(old)
        new.join("a", same_life=True, held=self.held(old, "a"))
        if how == "new life":
            new.join("b")
        else:
            new.join("b", same_life=True, held=self.held(old, "b", active=False) if how == "not active" else ())
        assert (new.state, new.epoch) == (State.FORMING, old.epoch + 1)
        assert ("a", old.epoch) in [(r.worker_id, r.epoch) for r in new.took(actions.Release)]

    def test_other_terms_are_another_pipeline(self) -> None:
        old = serving()
        new = self.restart(old, goal=target(terms="other"))
        assert not new.mesh.restoring
        new.join("a", same_life=True, held=self.held(old, "a"))
        new.join("b", same_life=True, held=self.held(old, "b"))
        assert (new.state, new.epoch) == (State.FORMING, old.epoch + 1)

    def test_an_epoch_that_only_a_worker_remembers_is_passed(self) -> None:
        world = World()
        world.join("a", held=(v.Held("pipeline-0", 41, 0, (0, 3), 7, True, REVISION),))
        world.join("b")
        assert world.epoch == 42
        assert ("a", 41) in [(r.worker_id, r.epoch) for r in world.took(actions.Release)]

    def test_a_later_epoch_heard_while_serving_makes_a_still_later_one(self) -> None:
        world = serving()
        world.join("late", held=(v.Held("pipeline-0", 90, 0, (0, 3), 7, True, REVISION),))
        assert (world.state, world.epoch) == (State.FORMING, 91)

    def test_registering_again_in_the_same_life_changes_nothing_if_it_still_holds_its_stage(self) -> None:
        world = serving()
        before = world.epoch
        world.join("b", same_life=True, held=self.held(world, "b"))
        assert (world.state, world.epoch) == (State.SERVING, before)
        world.join("b", same_life=True)
        assert (world.state, world.epoch) == (State.FORMING, before + 1)


def test_what_a_worker_could_not_do_is_asked_of_it_again_after_a_while() -> None:
    """Whatever was final for it may have been of the moment: a file system that was away, memory that others had."""
    world = World(target(2, takeover_s=1e6))
    world.join("a"), world.join("b")
    world.fail(1, "assign", "cannot read model.safetensors", final=True)
    assert (world.state, world.final) == (State.DOWN, True)
    world.took(actions.Assign)
    world.wait(REFUSED_S - 5, "a", "b")
    assert not world.took(actions.Assign), "it is not asked again and again"
    world.wait(10, "a", "b")
    assert world.state is State.FORMING
    world.serve()
    assert world.state is State.SERVING
