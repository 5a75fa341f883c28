"""An outage is told, bounded and counted."""

from __future__ import annotations

import asyncio
from collections import deque

from prometheus_client import generate_latest

from stagemesh.gateway.drive.outage import KEPT, Outage
from stagemesh.gateway.telemetry.metrics import Metrics


def test_it_begins_with_the_first_loss_and_ends_with_a_token() -> None:
    async def go() -> None:
        given_up: list[str] = []
        metrics = Metrics()
        outage = Outage(metrics, 30, given_up.append, deque())
        outage.recovered("p", 1, 0, 0)
        assert (outage.open, list(outage.events)) == (False, [])
        outage.lost("p", 1, "stage 1 went away", 4)
        outage.lost("p", 2, "and again", 4)
        assert outage.open
        outage.recovered("p", 3, 4, 77)
        assert not outage.open
        told = [(e["event"], e["epoch"], e.get("cause"), e.get("replayed_tokens")) for e in outage.events]
        assert told == [
            ("lost", 1, "stage 1 went away", None), ("lost", 2, "and again", None), ("recovered", 3, None, 77),
        ]  # fmt: skip
        text = generate_latest(metrics.registry).decode()
        for line in ("pipeline_losses_total 2.0", "replayed_tokens_total 77.0", "recovery_seconds_count 1.0"):
            assert f"stagemesh_{line}" in text
        assert given_up == []

    asyncio.run(go())


def test_it_is_given_up_at_its_deadline_which_a_second_loss_does_not_move() -> None:
    async def go() -> None:
        given_up: asyncio.Queue[str] = asyncio.Queue()
        outage = Outage(Metrics(), 0.2, given_up.put_nowait, deque())
        outage.lost("p", 1, "stage 1 went away", 4)
        await asyncio.sleep(0.05)
        outage.lost("p", 2, "and again", 4)
        cause = await asyncio.wait_for(given_up.get(), 5)
        assert cause == "stage 1 went away; nothing took its place within 0.2 s (--recovery-deadline)"
        assert not outage.open
        outage.recovered("p", 3, 4, 77)
        assert outage.events[-1]["event"] == "lost"
        outage.lost("p", 3, "third", 0)
        outage.close()
        assert not outage.open

    asyncio.run(go())


def test_events_are_bounded() -> None:
    async def go() -> None:
        outage = Outage(Metrics(), 30, print, deque(maxlen=KEPT))
        for epoch in range(3 * KEPT):
            outage.lost("p", epoch, "", 0)
        outage.close()
        assert [e["epoch"] for e in outage.events] == list(range(2 * KEPT, 3 * KEPT))

    asyncio.run(go())
