"""What clients see when parts of a mesh are killed, stopped or drained: `python -m benchmarks.recovery MODEL`."""
