"""Records every step while a trace is being taken, and nothing otherwise.

Times are kept as they were taken: the gateway's by its own clock, each stage's by the monotonic clock of its host. The
reader converts them to one clock (`stagemesh/bench/clocks.py`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stagemesh import process
from stagemesh.errors import DeadlineExceeded, InvalidRequest, QueueFull
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..schedule.plan import Plan

MAX_STEPS = 4096
"""Most steps of one trace. They make a few megabytes of JSON."""
MAX_WAIT_S = 300.0
MAX_OPEN = 256
"""Bound of the steps that are recorded without a result. Steps of a lost epoch never get one."""
TIMES = tuple(f.name for f in types_pb2.StepTiming.DESCRIPTOR.fields if f.name.endswith("_us"))
STAGE_COLUMNS = (*TIMES, "result_received_us")
"""One stage's times in a record: fields of `StepTiming` as the stage reported them, and `result_received_us` by the
gateway's clock."""


@dataclass
class StepRecord:
    """One step as /trace returns it, from its plan to its tokens, in microseconds of the gateway's monotonic clock."""

    pipeline_id: str
    epoch: int
    step: int
    planned_us: int
    sent_us: int
    """When the plan was handed to the streams of all stages."""
    sequences: list[int]
    tokens: int
    prefill_tokens: int
    stages: list[list[int] | None]
    """`STAGE_COLUMNS` of each stage. None until its result has arrived."""
    sampled: list[int] = field(default_factory=list)
    """The sequences that got a token, once for each token."""
    received_us: int = 0
    """When the last stage's result arrived."""
    delivered_us: int = 0
    """When its tokens were delivered to their requests."""

    @property
    def whole(self) -> bool:
        """Whether all stages have answered and the tokens were delivered."""
        return self.delivered_us > 0 and all(stage is not None for stage in self.stages)


@dataclass(slots=True)
class _Capture:
    done: deque[StepRecord]
    """Finished records. Its maximal length is the number of wanted steps."""
    views: dict[tuple[str, int], types_pb2.PipelineView] = field(default_factory=dict)
    enough: asyncio.Event = field(default_factory=asyncio.Event)


class Recorder:
    """Records steps of all pipelines while a capture runs. At most one capture runs at a time."""

    def __init__(self) -> None:
        self._capture: _Capture | None = None
        self._open: OrderedDict[tuple[str, int, int], StepRecord] = OrderedDict()

    @property
    def active(self) -> bool:
        """Whether a capture runs."""
        return self._capture is not None

    @property
    def open_steps(self) -> int:
        """Number of steps that are recorded without their result."""
        return len(self._open)

    # -- the batch loop's side --------------------------------------------------------------------------------------

    def sent(self, view: types_pb2.PipelineView, plan: Plan, planned_us: int) -> None:
        """A plan was sent to all stages of `view`."""
        if self._capture is None:  # Without a capture, this check is the whole cost.
            return
        self._capture.views.setdefault((view.pipeline_id, view.epoch), view)
        self._open[view.pipeline_id, view.epoch, plan.step] = StepRecord(
            pipeline_id=view.pipeline_id,
            epoch=view.epoch,
            step=plan.step,
            planned_us=planned_us,
            sent_us=now_us(),
            sequences=[row.sequence.ident for row in plan.rows],
            tokens=sum(row.count for row in plan.rows),
            # A decode row computes only the newest token, and its sequence has sampled others before.
            prefill_tokens=sum(
                row.count for row in plan.rows if (row.count > 1 and not row.draft) or not row.sequence.log
            ),
            stages=[None] * len(view.stages),
        )
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)

    def result(self, view: types_pb2.PipelineView, stage: int, result: stage_pb2.StepResult) -> None:
        """A stage's result came. Steps that were sent before the capture began are ignored."""
        if self._capture is None or (record := self._open.get((view.pipeline_id, view.epoch, result.step))) is None:
            return
        received_us = now_us()
        record.stages[stage] = [*(getattr(result.timing, name) for name in TIMES), received_us]
        if stage == len(record.stages) - 1:
            record.received_us = received_us
            record.sampled = list(result.sequences)
        self._close_if_whole(record)

    def delivered(self, view: types_pb2.PipelineView, step: int) -> None:
        """The tokens of a step were delivered to their requests."""
        if self._capture is not None and (record := self._open.get((view.pipeline_id, view.epoch, step))) is not None:
            record.delivered_us = now_us()
            self._close_if_whole(record)

    def _close_if_whole(self, record: StepRecord) -> None:
        if self._capture is None or not record.whole:
            return
        del self._open[record.pipeline_id, record.epoch, record.step]
        self._capture.done.append(record)
        if len(self._capture.done) == self._capture.done.maxlen:
            self._capture.enough.set()

    # -- the route's side -------------------------------------------------------------------------------------------

    async def capture(self, steps: int, wait_s: float) -> dict[str, Any]:
        """JSON of the records of the next `steps` steps, or of those that end within `wait_s`.

        Raises InvalidRequest (bounds), QueueFull (a capture is running), DeadlineExceeded (no step came).
        """
        if not 1 <= steps <= MAX_STEPS:
            raise InvalidRequest(f"steps is {steps}; it must be between 1 and {MAX_STEPS}", param="steps")
        if not 0 < wait_s <= MAX_WAIT_S:
            raise InvalidRequest(
                f"timeout is {wait_s:g}; it must be more than 0 and at most {MAX_WAIT_S:g} seconds", param="timeout"
            )
        if self._capture is not None:
            raise QueueFull("another trace is being taken; try again when it is done", retry_after_s=wait_s)
        capture = self._capture = _Capture(deque(maxlen=steps))
        try:
            async with asyncio.timeout(wait_s):
                await capture.enough.wait()
        except TimeoutError:
            if not capture.done:
                raise DeadlineExceeded(
                    f"no step was run within {wait_s:g} s: send requests while the trace is taken, or let "
                    "`stagemesh bench trace --load 16x128x64` do it"
                ) from None
        finally:
            self._capture = None
            self._open.clear()
        return _answer(capture.done, capture.views)


def now_us() -> int:
    """Microseconds of this host's monotonic clock."""
    return time.monotonic_ns() // 1000


def _answer(records: Sequence[StepRecord], views: dict[tuple[str, int], types_pb2.PipelineView]) -> dict[str, Any]:
    return {
        "gateway": {"pid": os.getpid(), "boot_id": process.boot_id()},
        "pipelines": [
            {
                "pipeline_id": pipeline_id,
                "epoch": epoch,
                "model": view.model.name,
                "stages": [
                    {
                        "stage": s.stage,
                        "worker_id": s.worker_id,
                        "layers": [s.layers.first, s.layers.last],
                        "tp_size": s.tp_size,
                        "device": s.device.kind,
                        "route": s.route,
                    }
                    for s in view.stages
                ],
            }
            for (pipeline_id, epoch), view in views.items()
        ],
        "stage_columns": list(STAGE_COLUMNS),
        "steps": [vars(record) for record in records],
    }
