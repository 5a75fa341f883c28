"""Layer ranges and placements: cost model, partition, placement, transports, advice.

Pure functions of values. Nothing here knows the world, epochs or attempts.
"""
