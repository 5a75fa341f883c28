"""Workers and layers of a pipeline: kinds of workers, placement, transports, advice.

Pure functions of values. Nothing here knows the world, epochs or attempts.
"""
