"""Writes a rank's heartbeats: what it is doing, and the time until its next heartbeat.

That time comes from measured steps of the same size. So a large prompt on a slow core is not a hang, and a decode step
that takes half a second longer than ever is one. A size that was never measured may take long, and so may an order.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..messages.control import Kind
from ..messages.heartbeat import Activity, Beat, Heartbeats
from ..timing import StageTiming

MARGIN = 10.0
"""A stretch of a step may take this many times as long as the slowest recent one."""
FORGET = 0.7
"""Decay of the slowest stretch with each step of its size: the first steps of a size take much longer."""


class Heartbeat:
    """Heartbeats of one rank. A stretch is the time between two of them within a step, such as a layer."""

    def __init__(
        self,
        memory: Heartbeats,
        rank: int,
        timing: StageTiming,
        *,
        cuda: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loads = False
        """Whether weights are loaded beside steps. The loading thread may hold the interpreter's lock for a while."""
        self._memory, self._rank, self._timing, self._clock = memory, rank, timing, clock
        # With CUDA, the first decode step of each size is captured.
        self._alive_s = timing.alive_s + (timing.cuda_step_s if cuda else 0.0)
        self._tokens: int | None = None
        """Tokens of the step under way."""
        self._step_s = self._slowest_s = self._written_at = 0.0
        self._stretch_s: dict[int, float] = {}
        """Bit length of a step's number of tokens -> slowest recent stretch of such steps, in seconds."""

    def alive(self) -> None:
        """Writes that the rank is between two layers, or is idle."""
        now = self._clock()
        allowed_s = self._alive_s + (self._timing.beside_load_s if self.loads else 0.0)
        if self._tokens is None:
            beat = Beat(Activity.IDLE, 0, now, allowed_s)
        else:
            self._slowest_s = max(self._slowest_s, now - self._written_at)
            beat = Beat(Activity.STEP, self._tokens, now, allowed_s + self._step_s)
        self._written_at = now
        self._memory.write(self._rank, beat)

    def begin_step(self, tokens: int) -> None:
        """Writes that a step of `tokens` tokens begins."""
        self._tokens, self._step_s = tokens, self._most_s(tokens.bit_length())
        self._written_at = self._clock()
        self.alive()
        self._slowest_s = 0.0

    def end_step(self) -> None:
        """Records the step's slowest stretch, and writes that the rank is idle."""
        assert self._tokens is not None
        size = self._tokens.bit_length()
        self.alive()
        self._stretch_s[size] = max(self._slowest_s, FORGET * self._stretch_s.get(size, 0.0))
        self._tokens = None
        self.alive()

    def _most_s(self, size: int) -> float:
        """Returns the seconds that a stretch may take, from steps of this size or, in proportion, of a smaller one."""
        smaller = max((s for s in self._stretch_s if s <= size), default=None)
        if smaller is None:
            return self._timing.first_step_s
        return MARGIN * self._stretch_s[smaller] * float(1 << (size - smaller))

    def order(self, kind: Kind) -> None:
        """Writes that an order of the agent begins."""
        self._memory.write(self._rank, Beat(Activity.ORDER, kind, self._clock(), self._timing.order_sign_s))

    def load(self) -> None:
        """Writes that a load has made progress. The caller does this with every tensor."""
        self._memory.write(self._rank, Beat(Activity.LOAD, 0, self._clock(), self._timing.order_sign_s))
