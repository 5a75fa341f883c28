"""Attention over KV pages for the plain shard: what is known of a step beforehand, and a backend for each device."""
