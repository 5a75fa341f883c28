"""The error of benchmarks."""

from __future__ import annotations


class BenchmarkError(Exception):
    """The benchmark cannot run. The text says what is missing and what to do."""
