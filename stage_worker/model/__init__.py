"""A rank's part of the model: the choice of a shard, its files, and tensor parallelism over ranks.

`plain` uses transformers' own modules; compiled kernels are in `native`. Neither uses links, gateways or epochs.
"""
