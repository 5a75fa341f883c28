"""Attention over KV pages for the plain shard: what is known of a step beforehand, and the ways to compute it."""
