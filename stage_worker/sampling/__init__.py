"""Turns logits into tokens: the sampler, and the draft model's guesses.

The modules in this folder use no links, and no KV pages except the draft model's.
"""
