"""Numbers in, layer ranges and placements out: cost model, partition, placement, transports, advice.

Pure functions of values. Nothing in here knows the world, epochs or attempts.
"""
