"""From logits to tokens: the sampler, and a draft model's guesses.

No links and no pages but the draft model's own.
"""
