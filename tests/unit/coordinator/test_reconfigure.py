"""The coordinator's core, one story a test: forming, losing, failing, draining, restarting."""

from __future__ import annotations

import pytest
from mesh_world import (
    BOTH,
    REVISION,
    TIMING,
    Story,
    broken,
    done,
    drain,
    held,
    order,
    renewal,
    serving,
    stuck,
    target,
    undrain,
)

from stagemesh.coordinator import values as v
from stagemesh.coordinator.core import actions
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.planning.target import Target
from stagemesh.coordinator.policy.drain import check_drain
from stagemesh.coordinator.policy.form import place
from stagemesh.coordinator.policy.plan import MeshPlan
from stagemesh.coordinator.world.pipeline import State
from stagemesh.errors import ConfigError
from stagemesh.protos.v1 import types_pb2
from stagemesh.protos.v1.coordinator_pb2 import HeldAssignment
from stagemesh.protos.v1.stage_pb2 import (
    ActivateRequest,
    AssignRequest,
    AssignResponse,
    ConnectLinkRequest,
    PrepareRequest,
    ReleaseRequest,
)


class TestForming:
    def test_waits_until_every_stage_has_a_worker(self) -> None:
        story = Story()
        story.join("a")
        assert (story.state, story.took(AssignRequest)) == (State.DOWN, [])
        assert "stage 1 has no worker" in story.reason
        assert not story.final
        story.join("b")
        assert story.state is State.FORMING
        assert [(a.to.worker_id, v.span(a.request.layers), a.to.address) for a in story.took(AssignRequest)] == [
            ("a", (0, 3), "a:1"),
            ("b", (3, 6), "b:1"),
        ]

    def test_a_worker_whose_ranks_would_cut_a_head_gets_no_layers(self) -> None:
        story = Story(target(heads=frozenset({(4, 2)})))
        story.join("a", 0, tp=4), story.join("b", 1, tp=3)
        assert (story.state, story.final, story.took(AssignRequest)) == (State.DOWN, True, [])
        assert "worker b cannot hold layers: tensor parallel size 3" in story.reason
        assert "4 attention heads and 2 KV heads" in story.reason
        story.join("c", 1, tp=2)
        assert story.state is State.FORMING
        assert [a.to.worker_id for a in story.took(AssignRequest)] == ["a", "c"]
        story.serve()
        story.wait(60, "a", "b", "c")
        assert not story.took(PrepareRequest), "nor does it load any as a standby"
        story.lose("c")
        assert (story.state, story.final) == (State.DOWN, True)

    def test_a_worker_of_a_release_without_quantization_gets_no_layers_of_a_model_with_it(self) -> None:
        model = types_pb2.ModelRef(fingerprint=REVISION, quantization="int8")
        story = Story(target(model=model))
        story.join("a", 0), story.join("b", 1, protocol=2, version="0.2.0")
        assert story.state is State.DOWN
        assert "its release (0.2.0) has no --quantization" in story.reason
        story.join("c", 1)
        assert story.state is State.FORMING
        assert {a.request.model.quantization for a in story.took(AssignRequest)} == {"int8"}

    def test_assign_then_links_then_activate_then_publish(self) -> None:
        story = Story(target(3))
        for name in "abc":
            story.join(name)
        story.took(AssignRequest)
        story.load(0), story.load(2)
        assert story.took(ConnectLinkRequest) == []
        story.load(1)
        assert [
            (m.request.stage, m.request.transport, m.request.receiver_id) for m in story.took(ConnectLinkRequest)
        ] == [
            (0, "ucx", "b"),
            (1, "ucx", "c"),
            (2, "ucx", "a"),
        ]
        story.link(1)
        assert story.took(ActivateRequest) == []
        story.link(0)
        assert [a.request.stage for a in story.took(ActivateRequest)] == [0, 1, 2]
        story.ack(0), story.ack(2)
        assert story.state is State.FORMING
        story.ack(1)
        assert (story.state, story.reason) == (State.SERVING, "")

    def test_the_epoch_is_written_down_before_anyone_hears_of_it_and_the_plan_before_it_is_published(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        kinds = [type(a.request if isinstance(a, v.Order) else a) for a in story.actions]
        assert kinds.index(actions.Save) < kinds.index(AssignRequest)
        story.load(0), story.load(1), story.link(0), story.ack(0)
        story.actions.clear()
        story.ack(1)
        kinds = [type(a) for a in story.actions]
        assert kinds.index(actions.Save) < kinds.index(actions.Publish)

    def test_one_stage_needs_no_link(self) -> None:
        story = Story(target(1))
        story.join("a")
        story.load(0)
        assert [a.request.stage for a in story.took(ActivateRequest)] == [0]
        story.ack(0)
        assert story.state is State.SERVING

    def test_a_link_to_more_ranks_has_a_nonce_for_each_receiving_rank(self) -> None:
        story = Story()
        story.join("a", 0, tp=2), story.join("b", 1, tp=4)
        story.load(0), story.load(1)
        link, tokens = story.took(ConnectLinkRequest)
        assert len(set(link.request.nonces)) == 4
        assert link.offer.request.nonces == link.request.nonces
        assert all(0 < nonce < 1 << 32 for nonce in link.request.nonces)
        assert (link.request.tokens, link.offer.request.tokens, link.offer.request.stage) == (False, False, 1)
        assert (tokens.request.tokens, tokens.offer.request.tokens, tokens.offer.request.stage) == (True, True, 0)
        assert len(tokens.request.nonces) == 1
        assert link.offer.request.sender_addresses == [b"u", b"u"]

    def test_progress_is_published_without_haste(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        story.actions.clear()
        told = order("assign", "pipeline-0", story.epoch, 1)
        story.send(events.Answered(told, AssignResponse(loaded_bytes=5, total_bytes=10)))
        assert story.took(actions.Publish) == [actions.Publish(urgent=False)]
        assert story.world.workers["b"].progress == (5, 10)

    def test_standbys_are_left_alone(self) -> None:
        story = serving("spare")
        assert story.holders == ["a", "b"]


class TestTransport:
    def form(self, wanted: str, first: tuple[str, ...], second: tuple[str, ...]) -> Story:
        story = Story(target(transport=wanted))
        for name, has in (("a", first), ("b", second)):
            story.join(name, transports=tuple((n, a) for n, a in BOTH if n in has))
        story.actions.clear()
        story.load(0), story.load(1)
        return story

    def test_auto_falls_back_with_a_warning_that_says_why(self) -> None:
        story = self.form("auto", ("tcp", "ucx"), ("tcp",))
        (warning,) = [a.message for a in story.actions if isinstance(a, actions.Log) and a.warning]
        assert "b did not open ucx" in warning
        assert [m.request.transport for m in story.took(ConnectLinkRequest)] == ["tcp"] * 2

    def test_tcp_when_asked_for_is_no_warning(self) -> None:
        story = self.form("tcp", ("tcp", "ucx"), ("tcp", "ucx"))
        assert not [a for a in story.actions if isinstance(a, actions.Log) and a.warning]
        assert [m.request.transport for m in story.took(ConnectLinkRequest)] == ["tcp"] * 2

    def test_ucx_asked_for_and_missing(self) -> None:
        story = self.form("ucx", ("tcp", "ucx"), ("tcp",))
        assert (story.state, story.final) == (State.DOWN, True)
        assert "b did not open it" in story.reason

    def test_nothing_in_common(self) -> None:
        story = self.form("auto", ("ucx",), ("tcp",))
        assert story.state is State.DOWN
        assert "no transport in common" in story.reason

    def test_auto_gives_ucx_up_between_two_workers_where_it_failed_twice(self) -> None:
        story = self.form("auto", ("tcp", "ucx"), ("tcp", "ucx"))
        for _ in range(2):
            assert [m.request.transport for m in story.took(ConnectLinkRequest)] == ["ucx"] * 2
            story.fail(0, "link", "handshake timed out", transport_failed=True)
            story.wait(2.5, "a", "b")
            story.load(0), story.load(1)
        assert any(
            "handshake timed out" in a.message for a in story.actions if isinstance(a, actions.Log) and a.warning
        )
        assert [m.request.transport for m in story.took(ConnectLinkRequest)] == ["tcp"] * 2


class TestLoss:
    def test_the_next_worker_takes_over_and_the_others_keep_their_layers(self) -> None:
        story = serving("spare")
        before = story.epoch
        story.lose("b")
        assert (story.state, story.epoch) == (State.FORMING, before + 1)
        assert [(a.to.worker_id, v.span(a.request.layers)) for a in story.took(AssignRequest)] == [
            ("a", (0, 3)),
            ("spare", (3, 6)),
        ]
        story.serve()
        assert story.state is State.SERVING

    def test_without_another_the_pipeline_is_down_and_says_why(self) -> None:
        story = serving()
        before = story.epoch
        story.lose("b")
        assert (story.state, story.epoch, story.final) == (State.DOWN, before + 1, False)
        assert "stage 1: worker b is lost: its keep-alive stream ended" in story.reason
        assert [(r.to.worker_id, r.request.key.epoch) for r in story.took(ReleaseRequest)] == [("a", before)]
        story.join("b")
        assert (story.state, story.epoch) == (State.FORMING, before + 2)

    def test_a_lease_that_runs_out(self) -> None:
        story = serving()
        story.wait(0.5, "a")
        assert story.state is State.SERVING
        story.wait(0.15, "a")
        assert story.state is State.DOWN
        assert "worker b is lost: its lease of 600 ms ran out" in story.reason
        assert not story.world.knows("b", 1)

    def test_nobody_is_lost_when_the_coordinator_itself_stood_still(self) -> None:
        story = serving()
        story.now += 30.0
        story.send(events.Tick())
        assert story.state is State.SERVING
        story.wait(0.7)
        assert story.state is State.DOWN

    def test_nobody_is_lost_where_the_host_was_late(self) -> None:
        """Its cores were taken: our own ticks came late, and so may a renewal."""
        story = serving()
        for _ in range(10):
            story.now += 0.29
            story.send(renewal("a", 1)), story.send(renewal("b", 1))
            story.send(events.Tick())
        story.wait(0.75, "a")
        assert story.state is State.SERVING, "b may be as late as we were"
        story.wait(0.15, "a")
        assert story.state is State.DOWN, "and no later"

    def test_a_worker_whose_own_clock_is_late_gets_so_much_longer(self) -> None:
        story = serving()
        story.send(renewal("b", 1, 1.5))
        story.wait(2.0, "a")
        assert story.state is State.SERVING
        story.wait(0.2, "a")
        assert story.state is State.DOWN

    def test_lateness_is_forgotten(self) -> None:
        story = serving()
        story.now += 0.25
        story.send(renewal("a", 1)), story.send(renewal("b", 1))
        story.send(events.Tick())
        story.wait(60, "a", "b")
        story.wait(0.65, "a")
        assert story.state is State.DOWN

    def test_a_new_life_of_a_worker_is_a_loss_of_the_old_one(self) -> None:
        story = serving()
        before = story.epoch
        story.join("b")
        assert (story.state, story.epoch) == (State.FORMING, before + 1)
        assert story.pipelines["pipeline-0"].stages[1].incarnation == 2

    def test_the_end_of_an_old_life_is_no_news(self) -> None:
        story = serving()
        story.join("b")
        story.serve()
        story.send(events.WorkerLost("b", 1, "late"))
        assert story.state is State.SERVING

    def test_a_standby_that_goes_changes_nothing(self) -> None:
        story = serving("spare")
        before = story.epoch
        story.lose("spare")
        assert (story.state, story.epoch) == (State.SERVING, before)

    def test_a_worker_lost_while_forming(self) -> None:
        story = Story()
        for name in ("a", "b", "spare"):
            story.join(name)
        first = story.epoch
        story.load(0)
        story.lose("b")
        assert story.holders == ["a", "spare"]
        story.load(1, epoch=first)  # late news of the attempt before
        assert story.pipeline.main is not None
        assert story.pipeline.main.loaded == {}

    def test_orders_of_a_past_epoch_are_cancelled(self) -> None:
        story = serving("spare")
        story.lose("b")
        assert max(f.epoch for f in story.took(actions.Forget)) == story.epoch


class TestFailures:
    def test_a_passing_failure_is_tried_again_with_growing_pauses(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        pauses = []
        for _ in range(6):
            story.fail(1, "assign", "cannot be reached")
            assert (story.state, story.reason) == (State.FORMING, "stage 1: cannot be reached")
            before, at = story.epoch, story.now
            while story.epoch == before:
                story.wait(0.05, "a", "b")
            pauses.append(round(story.now - at, 1))
        assert pauses == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
        story.serve()
        assert story.state is State.SERVING

    def test_a_final_failure_is_not_tried_again_with_the_same_worker(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        story.actions.clear()
        story.fail(1, "assign", "tensor model.norm.weight is missing", final=True)
        assert (story.state, story.final) == (State.DOWN, True)
        assert "stage 1: worker b cannot assign: tensor model.norm.weight is missing" in story.reason
        before = story.epoch
        story.wait(10, "a", "b")
        assert (story.epoch, story.took(AssignRequest)) == (before, [])
        story.join("spare")
        assert [a.to.worker_id for a in story.took(AssignRequest)] == ["a", "spare"]

    def test_a_new_life_of_the_worker_is_asked_again(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        story.fail(1, "assign", "no such file", final=True)
        story.join("b")
        assert story.holders == ["a", "b"]

    def test_another_revision_is_refused_and_all_are_named(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        story.load(0)
        story.load(1, revision="0123456789abcdef")
        assert (story.state, story.final) == (State.DOWN, True)
        for word in ("worker b", "0123456789ab", "the coordinator and a have", REVISION[:12]):
            assert word in story.reason

    def test_too_few_pages_for_one_sequence(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        story.load(0, pages=4)
        story.load(1, pages=3)
        assert story.state is State.DOWN
        for word in ("stage 1", "worker b", "3 KV pages of 16", "--max-model-len 64 needs 4", "--max-model-len 48"):
            assert word in story.reason

    def test_a_broken_link_waits_a_moment_for_the_neighbours_death(self) -> None:
        story = serving("spare")
        before = story.epoch
        story.send(broken("a", story.lives["a"], "pipeline-0", before, "peer reset"))
        assert (story.state, story.reason) == (State.FORMING, "stage 0: a link broke: peer reset")
        assert story.took(AssignRequest) == []
        story.lose("b")
        assert story.holders == ["a", "spare"]

    def test_a_broken_link_between_two_that_live_is_made_anew(self) -> None:
        story = serving()
        before = story.epoch
        story.send(broken("a", story.lives["a"], "pipeline-0", before, "peer reset"))
        story.wait(0.3, "a", "b")
        assert (story.epoch, story.holders) == (before + 1, ["a", "b"])
        story.send(broken("b", story.lives["b"], "pipeline-0", before, "late news"))
        story.serve()
        assert story.state is State.SERVING

    def test_a_model_that_does_not_fit(self) -> None:
        story = Story()
        story.join("a", memory_bytes=10_000), story.join("b", memory_bytes=10_000)
        assert (story.state, story.final) == (State.DOWN, True)
        assert "does not fit 2 stages" in story.reason
        story.join("big", memory_bytes=10_000_000), story.join("bigger", memory_bytes=10_000_000)
        assert sorted(story.holders) == ["big", "bigger"]


class TestStandby:
    def told(self, story: Story) -> dict[str, v.Range]:
        return {told.to.worker_id: v.span(told.request.layers) for told in story.took(PrepareRequest)}

    def test_standbys_load_different_stages_once_everything_serves(self) -> None:
        story = Story()
        for name in ("a", "b", "s1", "s2", "s3"):
            story.join(name)
        assert self.told(story) == {}
        story.serve()
        assert self.told(story) == {}, (
            "what a lost stage had may be being computed: on one machine that needs all cores"
        )
        story.wait(TIMING.settled_s + 0.1, *story.world.workers)
        assert self.told(story) == {"s1": (0, 3), "s2": (3, 6), "s3": (0, 3)}
        story.prepared("s2")
        story.lose("b")
        assert story.holders == ["a", "s2"], "the one that has the layers loaded"

    def test_one_that_is_bound_to_a_stage_loads_that_one(self) -> None:
        story = serving()
        story.join("bound", pool=1)
        assert self.told(story) == {"bound": (3, 6)}

    def test_what_it_cannot_load_it_is_not_asked_for_again(self) -> None:
        story = serving()
        story.join("spare")
        assert self.told(story) == {"spare": (0, 3)}
        story.prepared("spare", failed="no such file")
        assert self.told(story) == {"spare": (3, 6)}
        story.prepared("spare", revision="e" * 64)
        assert self.told(story) == {}
        story.wait(5, "a", "b", "spare")
        assert self.told(story) == {}
        assert "another revision" in story.world.workers["spare"].refusals[1, (3, 6)]

    def test_what_failed_for_the_moment_is_tried_again_a_little_later(self) -> None:
        story = serving()
        story.join("spare")
        assert self.told(story) == {"spare": (0, 3)}
        story.prepared("spare", failed="its ranks are being started", final=False)
        story.wait(1, "a", "b", "spare")
        assert self.told(story) == {}
        story.wait(2, "a", "b", "spare")
        assert self.told(story) == {"spare": (0, 3)}

    def test_an_answer_that_comes_after_it_was_given_a_stage_changes_nothing(self) -> None:
        story = serving("spare")
        told = story.preparing("spare")
        assert v.span(told.request.layers) == (0, 3)
        story.lose("b")
        assert story.holders == ["a", "spare"]
        story.send(done(told))
        assert story.world.workers["spare"].kept is None


class TestStuck:
    def test_a_gateway_whose_steps_do_not_come_back_has_the_links_made_anew(self) -> None:
        story = serving()
        before = story.epoch
        story.send(stuck("pipeline-0", before - 1, "late"))
        assert (story.state, story.epoch) == (State.SERVING, before)
        story.send(stuck("pipeline-0", before, "no step came back"))
        assert story.state is State.FORMING
        assert "gateway g: no step came back" in story.reason
        story.wait(0.3, "a", "b")
        assert (story.epoch, story.holders) == (before + 1, ["a", "b"])

    def test_two_that_do_not_reach_each_other_are_not_made_neighbours(self) -> None:
        story = serving("spare")
        story.send(stuck("pipeline-0", story.epoch, "no step came back"))
        story.wait(0.3, "a", "b", "spare")
        assert story.holders == ["a", "b"], "nobody knows yet what is to blame"
        story.load(0), story.load(1)
        story.fail(0, "link", "no handshake", transport_failed=True)
        story.wait(1, "a", "b", "spare")
        assert story.holders == ["a", "spare"]

    def test_one_that_a_gateway_does_not_reach_is_replaced(self) -> None:
        story = serving("spare")
        before = story.epoch
        story.send(stuck("pipeline-0", before, "no session", ("b",)))
        story.wait(0.3, "a", "b", "spare")
        assert (story.epoch, story.holders) == (before + 1, ["a", "spare"])

    def test_one_that_was_not_reached_is_chosen_again_later(self) -> None:
        """Also where no pipeline is formed meanwhile, which might have forgotten it."""
        story = serving("spare")
        story.send(stuck("pipeline-0", story.epoch, "no session", ("b",)))
        story.wait(0.3, "a", "b", "spare")
        story.serve()
        pipeline = story.pipelines["pipeline-0"]

        def best() -> list[str]:
            return [h.worker_id for h in place(story.world, MeshPlan(), pipeline, ()).holders]

        assert best() == ["a", "spare"]
        story.wait(31, "a", "b", "spare")
        assert best() == ["a", "b"]

    @pytest.mark.parametrize(("spares", "unreachable"), [((), ("b",)), (("x", "y"), ("a", "b")), (("x",), ("b", "x"))])
    def test_nothing_is_changed_for_a_gateway_where_nobody_else_is_reached(
        self, spares: tuple[str, ...], unreachable: tuple[str, ...]
    ) -> None:
        """One that reaches none is itself cut off, and others may not be."""
        story = serving(*spares)
        before = story.epoch
        for _ in range(3):
            story.send(stuck("pipeline-0", before, "no session", unreachable))
            story.wait(0.3, "a", "b", *spares)
            assert (story.state, story.epoch, story.holders) == (State.SERVING, before, ["a", "b"])

    def test_without_another_they_go_on_trying(self) -> None:
        story = Story()
        story.join("a"), story.join("b")
        story.load(0), story.load(1)
        story.fail(0, "link", "no handshake", transport_failed=True)
        story.wait(1, "a", "b")
        assert story.holders == ["a", "b"]


class TestDrain:
    def test_its_layers_move_when_another_worker_has_loaded_them(self) -> None:
        story = serving("spare")
        story.prepared("spare")
        before = story.epoch
        story.send(drain("b"))
        assert (story.state, story.epoch) == (State.SERVING, before), "what runs goes on, and new requests are taken"
        assert [(p.to.worker_id, v.span(p.request.layers)) for p in story.took(PrepareRequest)] == [("spare", (3, 6))]
        story.prepared("spare")
        assert (story.holders, story.epoch, story.state) == (["a", "b"], before, State.SERVING), "it goes on meanwhile"
        story.prepare_move()
        assert (story.holders, story.epoch) == (["a", "spare"], before + 1)
        assert [(r.to.worker_id, r.request.key.epoch, r.request.alone) for r in story.took(ReleaseRequest)] == [
            ("a", before, False),
            ("b", before, False),
        ]
        story.wait(5, "a", "b", "spare")
        assert (story.state, story.epoch) == (State.SERVING, before + 1)
        assert story.took(PrepareRequest) == [], "a worker that drains is no standby"

    def test_at_once_to_one_that_has_them(self) -> None:
        story = serving("spare")
        story.prepared("spare")
        story.send(drain("a"))
        story.prepare_move()
        assert story.holders == ["spare", "b"]

    def test_without_another_worker_nothing_new_is_taken_until_one_comes(self) -> None:
        story = serving()
        before = story.epoch
        story.send(drain("b"))
        assert (story.state, story.epoch) == (State.DRAINING, before)
        assert "stage 1: worker b drains" in story.reason
        story.wait(5, "a", "b")
        assert story.state is State.DRAINING
        story.join("late")
        assert (story.state, story.reason) == (State.SERVING, "")
        story.prepared("late")
        story.prepare_move()
        assert (story.holders, story.epoch) == (["a", "late"], before + 1)

    def test_one_whose_stage_nobody_can_take_is_refused_with_a_way_out(self) -> None:
        story = serving()
        with pytest.raises(ConfigError, match=r"nobody can take stage 1 of pipeline-0 from worker b.*--force"):
            check_drain(story.world, "b")
        story.join("spare")
        check_drain(story.world, "b")
        check_drain(story.world, "spare")

    def test_a_drain_can_be_taken_back(self) -> None:
        story = serving()
        before = story.epoch
        story.send(drain("b"))
        assert story.state is State.DRAINING
        story.send(undrain("b"))
        assert (story.state, story.reason, story.epoch) == (State.SERVING, "", before)
        assert story.written.drains == {}
        story.lose("a")
        story.join("a")
        assert story.holders == ["a", "b"], "it holds stages again"

    def test_a_drain_that_was_not_forced_takes_nothing_from_anybody(self) -> None:
        """Whoever could take the stage is gone again."""
        story = serving("spare")
        story.send(drain("b", force=False))
        story.lose("spare")
        story.wait(5, "a", "b")
        assert (story.state, story.holders) == (State.SERVING, ["a", "b"])
        story.join("late")
        story.prepared("late")
        story.prepare_move()
        assert story.holders == ["a", "late"]

    def test_one_that_goes_before_it_has_moved(self) -> None:
        story = serving("spare")
        before = story.epoch
        story.send(drain("b"))
        story.lose("b")
        assert (story.holders, story.epoch) == (["a", "spare"], before + 1)

    def test_another_that_cannot_load_them(self) -> None:
        story = serving("spare")
        story.prepared("spare")
        story.send(drain("b"))
        story.prepared("spare", failed="no memory")
        assert story.state is State.DRAINING
        assert story.holders == ["a", "b"]

    def test_a_draining_worker_gets_no_stage(self) -> None:
        story = Story()
        story.join("a")
        story.send(drain("a"))
        story.join("b")
        assert story.state is State.DOWN
        story.join("c")
        assert sorted(story.holders) == ["b", "c"]

    def test_while_forming_the_others_go_on_without_it(self) -> None:
        story = Story()
        for name in ("a", "b", "spare"):
            story.join(name)
        story.send(drain("a"))
        assert sorted(story.holders) == ["b", "spare"]


class TestRestart:
    def restart(self, old: Story, goal: Target | None = None) -> Story:
        """A coordinator that knows only what was written down."""
        new = Story(goal, old.written.copy())
        new.lives = old.lives
        return new

    def held(self, story: Story, name: str, *, active: bool = True) -> tuple[HeldAssignment, ...]:
        return tuple(
            held("pipeline-0", story.epoch, p, active=active)
            for p in story.pipelines["pipeline-0"].stages
            if p.worker_id == name
        )

    def test_a_pipeline_whose_workers_are_all_active_goes_on_unchanged(self) -> None:
        old = serving()
        new = self.restart(old)
        assert new.world.restoring
        new.join("a", same_life=True, held=self.held(old, "a"))
        assert new.world.restoring
        new.join("b", same_life=True, held=self.held(old, "b"))
        assert not new.world.restoring
        assert (new.state, new.epoch, new.holders) == (State.SERVING, old.epoch, ["a", "b"])
        assert new.took(AssignRequest) + new.took(ReleaseRequest) == []
        assert new.pipeline.main is not None
        assert new.pipeline.main.routes[0] == "shared memory"

    def test_one_that_does_not_come_back_is_waited_for_then_replaced(self) -> None:
        old = serving()
        new = self.restart(old)
        new.join("a", same_life=True, held=self.held(old, "a"))
        new.join("spare")
        new.wait(TIMING.lease_s, "a", "spare")
        assert (new.state, new.took(AssignRequest)) == (State.DOWN, [])
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
        assert ("a", old.epoch) in [(r.to.worker_id, r.request.key.epoch) for r in new.took(ReleaseRequest)]

    def test_other_terms_are_another_pipeline(self) -> None:
        old = serving()
        new = self.restart(old, target(terms="other"))
        assert not new.world.restoring
        new.join("a", same_life=True, held=self.held(old, "a"))
        new.join("b", same_life=True, held=self.held(old, "b"))
        assert (new.state, new.epoch) == (State.FORMING, old.epoch + 1)

    def test_an_epoch_that_only_a_worker_remembers_is_passed(self) -> None:
        story = Story()
        story.join("a", held=(held("pipeline-0", 41, v.StagePlan(0, "a", 1, (0, 3), 7)),))
        story.join("b")
        assert story.epoch == 42
        assert ("a", 41) in [(r.to.worker_id, r.request.key.epoch) for r in story.took(ReleaseRequest)]

    def test_a_later_epoch_heard_while_serving_makes_a_still_later_one(self) -> None:
        story = serving()
        story.join("late", held=(held("pipeline-0", 90, v.StagePlan(0, "late", 1, (0, 3), 7)),))
        assert (story.state, story.epoch) == (State.FORMING, 91)

    def test_registering_again_in_the_same_life_changes_nothing_if_it_still_holds_its_stage(self) -> None:
        story = serving()
        before = story.epoch
        story.join("b", same_life=True, held=self.held(story, "b"))
        assert (story.state, story.epoch) == (State.SERVING, before)
        story.join("b", same_life=True)
        assert (story.state, story.epoch) == (State.FORMING, before + 1)


def test_what_a_worker_could_not_do_is_asked_of_it_again_after_a_while() -> None:
    """Whatever was final for it may have been of the moment: a file system that was away, memory that others had."""
    story = Story(target(2, takeover_s=1e6))
    story.join("a"), story.join("b")
    story.fail(1, "assign", "cannot read model.safetensors", final=True)
    assert (story.state, story.final) == (State.DOWN, True)
    story.took(AssignRequest)
    story.wait(TIMING.refused_s - 5, "a", "b")
    assert not story.took(AssignRequest), "it is not asked again and again"
    story.wait(10, "a", "b")
    assert story.state is State.FORMING
    story.serve()
    assert story.state is State.SERVING
