"""How a mesh grows, with stages that sleep instead of computing: `python -m benchmarks.scale KIND`."""
