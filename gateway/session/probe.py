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

STEPS = 2
PROMPT = (0, 0, 0)


def probe_messages(page: int, first: int, epoch: int) -> Iterator[stage_pb2.RunRequest]:
    """What every stage is told of these steps, the number of which begin with `first`. `page` is nobody's."""
    sequence, count = Sequence(PROMPT, 0, STEPS), len(PROMPT)
    opened = stage_pb2.OpenSequence(
        sequence=sequence.ident, sampling=types_pb2.SamplingParams(top_p=1.0), prompt_len=count
    )
    yield stage_pb2.RunRequest(open_sequence=opened)
    rows = [Row(sequence, 0, count, [page], samples=True), Row(sequence, count, 1, [], samples=True, result_of=first)]
    for step, row in enumerate(rows, start=first):
        yield stage_pb2.RunRequest(plan=plan_message(Plan(step, [row]), epoch, alone=False))
    closed = stage_pb2.CloseSequence(sequence=sequence.ident, after_step=first + STEPS - 1)
    yield stage_pb2.RunRequest(close_sequence=closed)
