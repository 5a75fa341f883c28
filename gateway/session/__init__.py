"""What the gateway says to other services: run streams to the workers of one epoch, reports to the coordinator.

I/O alone. What to run, and what an end of a stream means, is decided in `drive`.
"""
