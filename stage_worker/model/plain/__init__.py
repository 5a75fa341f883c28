"""The plain shard: transformers' own forward without the layers of other stages.

It serves models that have no faster shard, and is the reference for those that have one.
"""
