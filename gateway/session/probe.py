"""A probe of an epoch that serves no request yet: a prompt and one decode step across all stages.

It shows that every link and stage works before a request depends on it. It also makes each worker do the work of a
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
    """The messages of a probe for every stage. `first`: number of its first step. `page`: a page of no sequence."""
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
