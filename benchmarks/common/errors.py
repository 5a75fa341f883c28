"""The one error of benchmarks."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Nothing can be measured; the text says what is missing and what to do."""
