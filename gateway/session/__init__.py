"""The gateway's calls to other services: run streams to the workers of one epoch, and reports to the coordinator.

Only I/O. `drive` decides what to run, and what the end of a stream means.
"""
