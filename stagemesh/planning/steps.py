"""How many decode steps are in flight, and so of how many rows each: what yields the most tokens per second. Pure.

With n steps in flight over stages that take t_1, ..., t_S seconds for such a step, and h seconds from stage to stage, a
step leaves the pipeline every max((t_1 + ... + t_S + S * h) / n, t_1, ..., t_S) seconds. More steps fill the time in
which stages would wait. But the rows are spread over them, and each step reads weights: all those of a dense layer, and
the experts that one of its rows uses. So one step more pays if it fills what would be idle time, and not if the slowest
stage has something to do all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

HOP_S = 0.3e-3
"""Seconds from the end of a step on a stage to its begin on the next one, as measured between stages of one machine."""
TIE = 0.01
"""Rates within this share are equal."""

StageSeconds = Callable[[int], Sequence[float]]
"""Rows of a step -> seconds that each stage takes for it."""


def interval_s(stages: Sequence[float], steps: int, hop_s: float = 0.0) -> float:
    """Seconds from one step to the next, with `steps` of them in flight over stages that take `stages` seconds."""
    return max((sum(stages) + len(stages) * hop_s) / steps, *stages)


def tokens_per_s(seconds: StageSeconds, rows: int, steps: int, hop_s: float = 0.0) -> float:
    """Tokens per second of `rows` sequences that are spread over `steps` steps."""
    share = -(-rows // steps)
    in_flight = -(-rows // share)
    return rows / (in_flight * interval_s(seconds(share), in_flight, hop_s))


def best_steps(seconds: StageSeconds, rows: int, counts: Iterable[int], hop_s: float = 0.0) -> int:
    """The number of steps, of `counts`, that yields the most tokens per second.

    Of equal ones, the most: what comes late then holds up the fewest rows.
    """
    rates = {steps: tokens_per_s(seconds, rows, steps, hop_s) for steps in counts}
    enough = max(rates.values()) * (1 - TIE)
    return max(steps for steps, rate in rates.items() if rate >= enough)
