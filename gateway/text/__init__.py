"""Text and tokens: tokenizer with its special tokens, chat template, detokenizer, stop strings.

Nothing here knows pipelines or sockets.
"""
