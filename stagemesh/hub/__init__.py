"""Checkpoints on a Hugging Face hub: which files a process needs, where they lie in the cache, and how they get there.

Only `client.py` imports huggingface_hub, and only when it is used: a mesh that serves a folder never does.
"""
