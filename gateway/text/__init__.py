"""Text and tokens: tokenizer, chat template, detokenizer, stop strings, and the checkpoint's sampling defaults.

Nothing here knows pipelines or sockets.
"""
