"""What has to be computed again at a new epoch: the KV of stages that have none of what the sequences had. Pure.

A stage that kept its pages goes on with them. One that is new is refilled: the stage before it sends what its journal
holds, and the lost layers alone are computed. Where that journal has gaps the next one up is asked, and in front of the
first stage are the tokens themselves. A page that several sequences share is filled once, and by one of them alone:
whoever writes its first position wipes the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .plan import Row, Stages
from .sequence import Sequence as TokenSequence
from .sequence import State


def lost_stages(filled: Sequence[int], now: Sequence[int]) -> list[Stages]:
    """Runs of stages whose pages do not hold what the sequences computed. `filled`: the generations that did, in order;
    `now`: those that there are. Another number of stages means other layers on each."""
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
    """Hands out what is to be computed again, a step at a time, as long as the sequences want it."""

    def __init__(self, runs: Sequence[Stages], journals: Sequence[bytes], page_size: int) -> None:
        """`journals`: of each stage, one bit a page: what it sent for the page's positions can be sent again."""
        self._runs = list(runs)
        self._journals = list(journals)
        self._size = page_size
        self._filled: set[int] = set()
        """Pages that the current run has, or will have when the steps before are done."""
        self._reached: dict[TokenSequence, int] = {}
        """Positions done of sequences that did not fit into a step as a whole."""
        self._cut: TokenSequence | None = None
        """The one that is in the midst of a page: it goes on before anybody else who has that page."""

    def next(self, sequences: Iterable[TokenSequence], max_tokens: int) -> tuple[list[Row], Stages] | None:
        """The next step's rows, new pages apart, and the stages that compute them; None when nothing is left. The
        shortest go first."""
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
        """Where the next page begins that is filled already, or all is computed."""
        page = start // self._size
        while page * self._size < sequence.computed and sequence.pages[page] not in self._filled:
            page += 1
        return min(page * self._size, sequence.computed)

    def _source(self, sequence: TokenSequence, start: int, end: int) -> Stages:
        """From the stage behind the nearest one that can send the positions again."""
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
