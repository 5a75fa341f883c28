"""Measures what clients see when parts of a mesh are killed or drained: `python -m benchmarks.recovery MODEL`."""
