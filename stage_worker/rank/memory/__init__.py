"""The memory of a rank: shards of the model with their pages, how they are loaded and kept over epochs.

Links and sessions belong to assignments, not to this folder.
"""
