"""Turns logits into tokens: the sampler, and the draft model's guesses.

Modules here know no links, and no KV pages but the draft model's.
"""
