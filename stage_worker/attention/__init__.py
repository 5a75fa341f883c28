"""Attention over KV pages for the plain shard: metadata prepared before a step, and the kernels that compute it."""
