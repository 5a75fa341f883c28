"""The plain shard: transformers' own forward with foreign layers left out. It serves whatever has no faster one, and is
the reference for those that do.
"""
