"""What a rank holds in memory: shards of the model with their pages, how they are loaded, and kept over epochs.

No links and no sessions: what runs on it is an assignment's business.
"""
