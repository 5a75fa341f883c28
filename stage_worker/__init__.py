"""A stage worker: an agent process that speaks gRPC, and a rank process for each tensor-parallel rank that computes.

`agent` and `rank` know nothing of each other but the words in `messages`. The other folders are the rank's.
"""
