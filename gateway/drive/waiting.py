"""Waits for an event with a time-out."""

from __future__ import annotations

import asyncio
import contextlib


async def until_set(event: asyncio.Event, at_most_s: float | None) -> None:
    """Clears `event`, and waits until it is set, at most for `at_most_s`.

    Not by `asyncio.wait_for`: in Python 3.11 it can swallow a cancellation that comes as the event is set.
    """
    event.clear()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(at_most_s):
            await event.wait()
