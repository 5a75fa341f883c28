"""A stage worker: an agent process that speaks gRPC, and a rank process for each tensor-parallel rank that computes.

`agent` and `rank` share only the definitions in `messages`. The other folders belong to the rank.
"""
