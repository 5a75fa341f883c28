"""Text and tokens: tokenizer, chat template, detokenizer, stop strings, and what the checkpoint says of sampling.

No pipelines and no sockets.
"""
