"""All-pairs selection: few combinations in which every pair of values of two factors occurs (greedy, deterministic)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def all_combinations(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The whole product."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def pairwise(factors: Mapping[str, Sequence[Any]], least: int = 1) -> list[dict[str, Any]]:
    """Combinations that cover every pair; each next one is the one that covers most of what is still open, until none
    covers so many as `least`."""
    candidates = all_combinations(factors)
    open_pairs = {pair for candidate in candidates for pair in _pairs(candidate)}
    chosen: list[dict[str, Any]] = []
    while open_pairs:
        best = max(candidates, key=lambda candidate: len(open_pairs & _pairs(candidate)))
        if len(open_pairs & _pairs(best)) < least:
            break
        chosen.append(best)
        open_pairs -= _pairs(best)
    return chosen


def _pairs(combination: Mapping[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(combination.items(), 2))
