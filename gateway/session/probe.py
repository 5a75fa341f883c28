"""A token across all stages of an epoch that serves nobody yet: a prompt and one decode step behind it.

It shows that every link and stage works before anybody depends on it, and has each worker make what it makes at its
first step.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..schedule.plan import Plan, Row
from ..schedule.sequence import Sequence
from .messages import plan_message

PROMPT = (0, 0, 0)


class Probe:
    """The first steps of a session."""

    STEPS = 2

    def __init__(self, page: int, last_stage: int) -> None:
        self.done = False
        self._last_stage = last_stage
        self._sequence = Sequence(PROMPT, 0, self.STEPS)
        self._sequence.pages = [page]

    def messages(self, epoch: int) -> Iterator[stage_pb2.RunRequest]:
        """What every stage is told."""
        sequence, count = self._sequence, len(PROMPT)
        yield stage_pb2.RunRequest(
            open_sequence=stage_pb2.OpenSequence(
                sequence=sequence.ident, sampling=types_pb2.SamplingParams(top_p=1.0), prompt_len=count
            )
        )
        rows = [
            Row(sequence, 0, count, sequence.pages, samples=True),
            Row(sequence, count, 1, [], samples=True, result_of=1),
        ]
        for step, row in enumerate(rows, start=1):
            yield stage_pb2.RunRequest(plan=plan_message(Plan(step, [row]), epoch, alone=False))
        yield stage_pb2.RunRequest(
            close_sequence=stage_pb2.CloseSequence(sequence=sequence.ident, after_step=self.STEPS)
        )

    def result(self, stage: int, result: stage_pb2.StepResult) -> bool:
        """Whether that was the last of it."""
        self.done |= stage == self._last_stage and result.step == self.STEPS
        return self.done
