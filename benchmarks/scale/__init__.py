"""Measures how a mesh scales, with stages that sleep instead of computing: `python -m benchmarks.scale KIND`."""
