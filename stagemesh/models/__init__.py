"""Which checkpoints can be served: decided from config.json and the headers of the weights, without torch.

Coordinator, `serve` and ranks decide by the same functions. Nothing here reads a file or imports transformers.
"""
