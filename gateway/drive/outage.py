"""An outage lasts from the loss of a pipeline to the next token. Requests wait, and fail if it lasts too long.

Events are kept for `/mesh`, the newest last, and counted for Prometheus.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..telemetry.metrics import Metrics

log = logging.getLogger(__name__)

KEPT = 64
"""Number of events that are kept, over all pipelines."""
SENTENCES = {
    "lost": "%(pipeline_id)s epoch %(epoch)d is lost, %(requests)d requests wait: %(cause)s",
    "recovered": "%(pipeline_id)s epoch %(epoch)d goes on after %(duration_ms)d ms: %(requests)d requests, "
    "%(replayed_tokens)d tokens computed again",
    "moved": "%(pipeline_id)s has moved to epoch %(epoch)d: no step was planned for %(duration_ms)d ms, %(requests)d "
    "requests, %(pages_copied)d pages copied",
    "handed_over": "%(requests)d requests of %(pipeline_id)s go on at %(to)s",
}
"""Event -> its sentence in the log."""


class Outage:
    """The outage of one pipeline, open or not. After `deadline_s` it ends, and `give_up(cause)` is called."""

    def __init__(
        self,
        metrics: Metrics,
        deadline_s: float,
        give_up: Callable[[str], None],
        events: deque[dict[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.events = events
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._give_up = give_up
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Whether requests wait for a pipeline that was lost."""
        return self._since is not None

    @property
    def lasted_s(self) -> float:
        """Seconds since the outage began. 0 if none is open."""
        return 0.0 if self._since is None else self._clock() - self._since

    def lost(self, pipeline_id: str, epoch: int, cause: str, requests: int) -> None:
        """The pipeline is lost. If it is lost again before it recovers, the beginning and the deadline stay."""
        self._note("lost", pipeline_id, epoch, cause=cause, requests=requests)
        self._metrics.losses.inc()
        if self._since is None:
            self._since = self._clock()
            self._timer = asyncio.get_running_loop().call_later(self._deadline_s, self._expired, cause)

    def recovered(self, pipeline_id: str, epoch: int, requests: int, replayed_tokens: int) -> None:
        """A token has crossed the pipeline again."""
        if self._since is None:
            return
        lasted_s = self.lasted_s
        self.close()
        duration_ms = round(lasted_s * 1000)
        self._note(
            "recovered", pipeline_id, epoch, duration_ms=duration_ms, requests=requests, replayed_tokens=replayed_tokens
        )
        self._metrics.recovery_s.observe(lasted_s)
        self._metrics.replayed_tokens.inc(replayed_tokens)

    def moved(self, pipeline_id: str, epoch: int, paused_s: float, requests: int, pages: int) -> None:
        """The pipeline has switched to its next epoch. No step was planned for `paused_s`."""
        self._note(
            "moved", pipeline_id, epoch, duration_ms=round(paused_s * 1000), requests=requests, pages_copied=pages
        )
        self._metrics.move_s.observe(paused_s)

    def handed_over(self, pipeline_id: str, to: str, requests: int) -> None:
        """Requests of one pipeline go on at another one."""
        self.close()
        self._note("handed_over", pipeline_id, 0, to=to, requests=requests)

    def close(self) -> None:
        """Ends the outage, if one is open."""
        self._since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self, cause: str) -> None:
        self.close()
        log.warning("not recovered within %g s: requests end", self._deadline_s)
        self._give_up(f"{cause}; nothing took its place within {self._deadline_s:g} s (--recovery-deadline)")

    def _note(self, event: str, pipeline_id: str, epoch: int, **more: Any) -> None:
        entry = {"event": event, "at": round(time.time(), 3), "pipeline_id": pipeline_id, "epoch": epoch, **more}
        self.events.append(entry)
        log.log(logging.WARNING if event == "lost" else logging.INFO, SENTENCES[event], entry)
