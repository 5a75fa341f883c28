"""`stagemesh bench`: records of steps, taken from a running gateway, on one clock, as a table and a picture.

What a user runs on a mesh of theirs belongs here. What this repository's own figures come from is in `benchmarks/`.
"""
