"""`stagemesh serve`: which processes make a mesh on one machine, their start, their restarts and their end.

Nothing in here is known to the services: they would not notice whether `serve` started them.
"""
