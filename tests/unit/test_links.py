"""Links over every transport, both ends in one process: handshake, credits, lanes, what a dead lane leaves behind."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from links_bench import DTYPE, HIDDEN, Bench, identity

from stagemesh.errors import StaleEpoch, TransportError
from stagemesh.stage_worker.links.link import LinkSender, sending_rank
from stagemesh.stage_worker.links.wire import FIN, data_tag, pack_count, tag_of


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def test_steps_arrive_in_their_shapes(bench: Bench) -> None:
    sender, receiver = bench.joined()
    for step, count in enumerate([1, 8, 100, 1, 37]):
        receiver.post(0, step, (count, HIDDEN))
        bench.drive(lambda: sender.can_send(0))
        sender.send(0, step, rows(count, step))
        assert torch.equal(bench.take(receiver, 0, step), rows(count, step))
    assert sender.route == receiver.route != "unknown"


def test_what_came_within_a_long_step_comes_in_time(bench: Bench) -> None:
    """Transports are driven between layers, links between steps: both ends hear of each other behind a deadline."""
    sender, receiver = bench.link(identity())
    for end in (receiver, sender):
        deadline = time.monotonic() + 10
        while not end.heard:
            bench.left.progress(), bench.right.progress()
            assert time.monotonic() < deadline
        end.progress(now=time.monotonic() + 60)
        assert end.up, end.error


def test_credits_bound_the_sender(bench: Bench) -> None:
    """With 3 credits, no more than 3 frames are ever out, however long the receiver waits."""
    sender, receiver = bench.joined(credits=3)
    for step in range(10):
        receiver.post(0, step, (4, HIDDEN))
    sent = consumed = 0
    while consumed < 10:
        while sent < 10 and sender.can_send(0):
            sender.send(0, sent, rows(4, sent))
            sent += 1
        assert sent - consumed <= 3
        for _ in range(20):
            bench.turn()
        if not sender.can_send(0) and sent < 10:
            assert sender.unconsumed(0) == 3
            with pytest.raises(TransportError, match="no credit"):
                sender.send(0, sent, rows(4, sent))
        assert torch.equal(bench.take(receiver, 0, consumed), rows(4, consumed))
        consumed += 1
    bench.drive(lambda: sender.unconsumed(0) == 0)


def test_the_wait_for_a_credit_is_timed(bench: Bench) -> None:
    sender, receiver = bench.joined(credits=1)
    receiver.post(0, 0, (1, HIDDEN))
    sender.send(0, 0, rows(1, 0))
    assert sender.take_wait_send_s(0) == 0
    assert not sender.can_send(0)
    began = time.perf_counter()
    bench.drive(lambda: time.perf_counter() - began > 0.05)
    bench.take(receiver, 0, 0)
    bench.drive(lambda: sender.can_send(0))
    assert 0.05 <= sender.take_wait_send_s(0) < 5
    assert sender.take_wait_send_s(0) == 0


def test_a_frame_that_came_before_its_post_is_found(bench: Bench) -> None:
    sender, receiver = bench.joined()
    sender.send(0, 0, rows(100, 1))
    for _ in range(50):
        bench.turn()
    assert receiver.ready(0, 0) is None
    receiver.post(0, 0, (100, HIDDEN))
    assert torch.equal(bench.take(receiver, 0, 0), rows(100, 1))


def test_steps_run_in_another_order_than_posted_do_not_lock_up(bench: Bench) -> None:
    """Six posts on two buffers, sent backwards: the frames that come have no buffer of their own at first."""
    sender, receiver = bench.joined(credits=2)
    for step in range(6):
        receiver.post(0, step, (100, HIDDEN))
    to_send, to_take = [5, 4, 3, 2, 1, 0], set(range(6))

    def over() -> bool:
        if to_send and sender.can_send(0):
            step = to_send.pop(0)
            sender.send(0, step, rows(100, step))
        for step in list(to_take):
            tensor = receiver.ready(0, step)
            if tensor is not None:
                assert torch.equal(tensor, rows(100, step))
                receiver.release(0, step)
                to_take.remove(step)
        return not to_take

    bench.drive(over)


def test_the_step_may_wrap(bench: Bench) -> None:
    sender, receiver = bench.joined()
    for step in (0xFFFFEF, 0xFFFFF0, (1 << 40) + 7):
        receiver.post(0, step, (2, HIDDEN))
        sender.send(0, step, rows(2, step & 0xFF))
        assert torch.equal(bench.take(receiver, 0, step), rows(2, step & 0xFF))
        bench.drive(lambda: sender.unconsumed(0) == 0)


def test_lanes_do_not_share_credits_or_frames(bench: Bench) -> None:
    sender, receiver = bench.joined(credits=1)
    receiver.open_lane(9)
    sender.open_lane(9)
    for slot in (0, 9):
        receiver.post(slot, 1, (5, HIDDEN))
        assert sender.can_send(slot)
        sender.send(slot, 1, rows(5, slot))
    assert not sender.can_send(0)
    assert torch.equal(bench.take(receiver, 9, 1), rows(5, 9))
    bench.drive(lambda: sender.can_send(9))
    assert not sender.can_send(0)
    assert torch.equal(bench.take(receiver, 0, 1), rows(5, 0))


@pytest.mark.parametrize("turns", [0, 1, 3, 30])
def test_a_lane_closed_under_way_leaves_nothing_to_the_next_one(bench: Bench, turns: int) -> None:
    """Frames posted, unposted and half way when both ends close the lane; the same slot and steps are used again."""
    sender, receiver = bench.joined(credits=4, max_rows=4000)
    for step in (0, 1, 7):
        receiver.post(0, step, (4000, HIDDEN))
    for step in (0, 1, 2, 3):
        sender.send(0, step, torch.full((4000, HIDDEN), 13.0, dtype=DTYPE))
    for _ in range(turns):
        bench.turn()
    receiver.close_lane(0)
    with pytest.raises(TransportError, match="slot 0"):
        receiver.open_lane(0)
    sender.close_lane(0)
    assert not sender.can_send(0)
    bench.drive(lambda: sender.lane_closed(0) and receiver.lane_closed(0))
    assert receiver.quarantined() == 0
    receiver.open_lane(0)
    sender.open_lane(0)
    for step in range(8):
        receiver.post(0, step, (4000, HIDDEN))
    for step in range(8):
        bench.drive(lambda: sender.can_send(0))
        sender.send(0, step, rows(4000, step))
        assert torch.equal(bench.take(receiver, 0, step), rows(4000, step))
    assert receiver.error is sender.error is None


def test_buffers_of_a_closed_lane_stay_until_the_sender_has_closed_too(bench: Bench) -> None:
    sender, receiver = bench.joined()
    receiver.post(0, 0, (100, HIDDEN))
    receiver.close_lane(0)
    for _ in range(100):
        bench.turn()
    assert not receiver.lane_closed(0)  # a frame may still be sent
    sender.send(0, 0, rows(100, 0))
    sender.close_lane(0)
    bench.drive(lambda: receiver.lane_closed(0) and sender.lane_closed(0))


def test_a_lane_is_not_free_while_a_frame_is_missing(bench: Bench) -> None:
    """The sender's last word overtakes two frames."""
    _, receiver = bench.joined()
    nonce = receiver.identity.nonce
    raw = bench.left.connect(bench.right.address())
    raw.send(tag_of(nonce, 0, FIN), pack_count(2))
    receiver.close_lane(0)
    for missing in (2, 1):
        for _ in range(100):
            bench.turn()
        assert not receiver.lane_closed(0), f"{missing} frames are missing"
        raw.send(data_tag(nonce, 0, missing), rows(10, 1))
    bench.drive(lambda: receiver.lane_closed(0))


def test_frames_of_an_old_link_are_never_delivered(bench: Bench) -> None:
    """The old link dies with frames under way; a new one, of another nonce, joins the same two workers."""
    sender, receiver = bench.joined(credits=4)
    receiver.post(0, 0, (100, HIDDEN))
    for step in range(4):
        sender.send(0, step, torch.full((100, HIDDEN), 13.0, dtype=DTYPE))
    receiver.close()
    bench.drive(lambda: receiver.drained)
    bench.links.remove(receiver)  # nobody turns it any more
    old = receiver.identity.nonce
    late = bench.left.connect(bench.right.address()).send(data_tag(old, 0, 9), rows(100, 9))
    bench.drive(lambda: late.done)
    fresh_sender, fresh = bench.joined(credits=4)
    for step in range(4):
        fresh.post(0, step, (100, HIDDEN))
        fresh_sender.send(0, step, rows(100, step))
        assert torch.equal(bench.take(fresh, 0, step), rows(100, step))
    sender.close()
    bench.drive(lambda: sender.drained)
    for _ in range(200):
        bench.turn()
    assert not any(bench.right.probe(data_tag(old, 0, step)) for step in (0, 1, 2, 3, 9))


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ({"epoch": 2}, StaleEpoch, "epoch 2"),
        ({"secret": bytes(16)}, TransportError, "secret"),
        ({"hidden_size": 128}, TransportError, "128"),
        ({"dtype": torch.float32}, TransportError, "dtype code 1"),
    ],
    ids=["epoch", "secret", "hidden size", "dtype"],
)
def test_a_wrong_hello_is_refused_with_the_reason_and_a_right_one_still_welcome(
    bench: Bench, wrong: dict[str, object], error: type[Exception], why: str
) -> None:
    ours = identity()
    sender, receiver = bench.link(ours, dataclasses.replace(ours, **wrong))  # type: ignore[arg-type]
    bench.drive(lambda: sender.error is not None)
    assert isinstance(sender.error, error)
    assert why in str(sender.error)
    assert receiver.refused_count == 1
    assert why in str(receiver.refusal)
    assert not receiver.up
    assert receiver.error is None
    right = LinkSender(bench.left, bench.right.address(), ours)
    bench.links.append(right)
    bench.drive(lambda: right.up and receiver.up)


def test_a_sender_that_nobody_answers_fails_at_its_deadline(bench: Bench) -> None:
    sender = LinkSender(bench.left, bench.right.address(), identity(), timeout_s=0.2)
    bench.links.append(sender)
    began = time.monotonic()
    bench.drive(lambda: sender.error is not None)
    assert time.monotonic() - began < 2
    assert "0.2 s" in str(sender.error)


def test_a_closed_link_refuses_and_drains(bench: Bench) -> None:
    sender, receiver = bench.joined(max_rows=4000)
    receiver.post(0, 0, (4000, HIDDEN))
    sender.send(0, 0, rows(4000, 0))
    sender.close()
    assert not sender.can_send(0)
    with pytest.raises(TransportError):
        sender.send(0, 1, rows(1, 1))
    bench.drive(lambda: sender.drained)


def test_a_step_too_large_for_the_lane_names_both_numbers(bench: Bench) -> None:
    _, receiver = bench.joined(max_rows=10)
    with pytest.raises(TransportError, match=r"1408 bytes.*1280"):
        receiver.post(0, 0, (11, HIDDEN))
    receiver.post(0, 1, (1, HIDDEN))
    with pytest.raises(TransportError, match="already"):
        receiver.post(0, 1, (1, HIDDEN))


@pytest.mark.parametrize(
    ("senders", "receivers", "expected"),
    [(1, 1, [0]), (2, 1, [0]), (1, 3, [0, 0, 0]), (2, 4, [0, 0, 1, 1]), (4, 2, [0, 2]), (3, 2, [0, 1])],
)
def test_every_receiving_rank_has_one_sending_rank(senders: int, receivers: int, expected: list[int]) -> None:
    assert [sending_rank(rank, senders, receivers) for rank in range(receivers)] == expected
