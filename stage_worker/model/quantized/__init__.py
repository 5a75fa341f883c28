"""Weights in few bits: one form for all formats of checkpoints, their readers, and quantization while loading."""
