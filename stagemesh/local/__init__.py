"""`stagemesh serve`: the processes of a mesh on one machine, their start, their restarts and their end.

The services do not know this folder: they run in the same way without `serve`.
"""
