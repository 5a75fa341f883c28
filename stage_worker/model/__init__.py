"""The model as a rank holds it: which shard is made, of which files, over which ranks.

`plain` is transformers' own modules; compiled kernels are in `native`. Neither knows of links, gateways or epochs.
"""
