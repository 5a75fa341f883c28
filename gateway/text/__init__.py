"""Text and tokens: tokenizer, chat template, detokenizer, stop strings, and the checkpoint's sampling defaults.

Pipelines and sockets are not known here.
"""
