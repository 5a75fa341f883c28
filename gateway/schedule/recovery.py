"""Plans what must be computed again at a new epoch: the KV of stages that lost it. Pure.

A stage that kept its pages goes on with them. A new one is refilled: the stage before it sends what its journal holds,
and only the lost layers are computed. If that journal has gaps, the stage before that one is used, and so on; the first
stage has the tokens themselves. A page that several sequences share is filled once, and by only one of them: writing
its first position wipes the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .plan import Row, Stages
from .sequence import Sequence as TokenSequence
from .sequence import State


def lost_stages(filled: Sequence[int], now: Sequence[int]) -> list[Stages]:
    """Runs of stages whose pages do not hold what the sequences computed.

    `filled`: for each stage, the generation of pages that held it. `now`: the present generation. With another number
    of stages, each has other layers, so all are lost.
    """
    if len(filled) != len(now):
        return [(0, len(now) - 1)]
    runs: list[Stages] = []
    for stage, generation in enumerate(now):
        if generation == filled[stage]:
            continue
        if runs and runs[-1][1] == stage - 1:
            runs[-1] = runs[-1][0], stage
        else:
            runs.append((stage, stage))
    return runs


class Recovery:
    """Plans the steps that compute lost positions again."""

    def __init__(self, runs: Sequence[Stages], journals: Sequence[bytes], page_size: int) -> None:
        """`journals`: for each stage, one bit per page: whether it can send again what it sent for the page."""
        self._runs = list(runs)
        self._journals = list(journals)
        self._size = page_size
        self._filled: set[int] = set()
        """Pages that are filled on the current run of stages, or will be when earlier steps are done."""
        self._reached: dict[TokenSequence, int] = {}
        """Sequence that did not fit into one step -> number of its positions that are done."""
        self._cut: TokenSequence | None = None
        """The sequence that stopped within a page. It goes first, before others that share the page."""

    def next(self, sequences: Iterable[TokenSequence], max_tokens: int) -> tuple[list[Row], Stages] | None:
        """The next step's rows, without their new pages, and the stages that compute them. None when nothing is left.

        The shortest sequences go first.
        """
        running = (s for s in sequences if s.state is State.RUNNING)
        ordered = sorted(running, key=lambda s: (s is not self._cut, s.computed))
        while self._runs:
            rows, stages, left = list[Row](), None, max_tokens
            for sequence in ordered:
                start = self._start(sequence)
                if not left or start >= sequence.computed:
                    continue
                end = self._end(sequence, start)
                source = self._source(sequence, start, end)
                if stages not in (None, source):
                    continue
                stages = source
                count = min(end - start, left)
                left -= count
                rows.append(Row(sequence, start, count, [], samples=False))
                self._note(sequence, start + count)
            if stages is not None:
                self._cut = rows[-1].sequence if not left else None
                # Stages that were not lost and compute again write into their journals, and older entries may go.
                for stage in range(stages[0], self._runs[0][0]):
                    self._journals[stage] = b""
                return rows, stages
            self._runs.pop(0)
            self._filled.clear()
            self._reached.clear()
            self._cut = None
        return None

    def _start(self, sequence: TokenSequence) -> int:
        page = self._reached.get(sequence, 0) // self._size
        while page * self._size < sequence.computed and sequence.pages[page] in self._filled:
            page += 1
        return max(page * self._size, self._reached.get(sequence, 0))

    def _end(self, sequence: TokenSequence, start: int) -> int:
        """The position where the next filled page begins, or where the computed positions end."""
        page = start // self._size
        while page * self._size < sequence.computed and sequence.pages[page] not in self._filled:
            page += 1
        return min(page * self._size, sequence.computed)

    def _source(self, sequence: TokenSequence, start: int, end: int) -> Stages:
        """The stages that compute the positions. The first follows the nearest stage that can send them again."""
        first, last = self._runs[0]
        pages = sequence.pages[start // self._size : -(-end // self._size)]
        while first > 0 and not _covers(self._journals[first - 1], pages):
            first -= 1
        return first, last

    def _note(self, sequence: TokenSequence, end: int) -> None:
        whole = -(-end // self._size) if end == sequence.computed else end // self._size
        self._filled.update(sequence.pages[:whole])
        self._reached[sequence] = end


def _covers(journal: bytes, pages: Iterable[int]) -> bool:
    """Whether the journal holds all of `pages`."""
    return all(page >> 3 < len(journal) and journal[page >> 3] >> (page & 7) & 1 for page in pages)
