"""Finds stop strings in a text that comes in pieces. It holds back only text that may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Knuth, Morris and Pratt's automaton for each stop string: each character is read once per string.

    The match that is complete first wins. Of two that are complete at the same character, the longer wins. So the
    result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._fail = [_failure(stop) for stop in self._stops]
        self._state = [0] * len(self._stops)
        """How many characters of each stop string the text ends with."""
        self._include = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Adds `text`. Returns (final text, the stop string that was found or None). Do not call it after a stop
        string."""
        buffer = self._held + text
        end, which = len(text) + 1, -1
        for s, stop in enumerate(self._stops):
            state, fail = self._state[s], self._fail[s]
            if state == 0 and stop[0] not in text:
                continue
            for at, char in enumerate(text, 1):
                if at >= end:
                    break
                while state and stop[state] != char:
                    state = fail[state - 1]
                if stop[state] == char:
                    state += 1
                    if state == len(stop):
                        end, which = at, s
                        break
            self._state[s] = state
        if which >= 0:
            stop = self._stops[which]
            cut = len(self._held) + end
            self._held = ""
            return buffer[: cut if self._include else cut - len(stop)], stop
        keep = max(self._state)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def finish(self) -> str:
        """The text that was held back, now that no stop string can come of it."""
        held, self._held = self._held, ""
        return held


def _failure(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    fail = [0] * len(pattern)
    k = 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = fail[k - 1]
        if pattern[i] == pattern[k]:
            k += 1
        fail[i] = k
    return fail
