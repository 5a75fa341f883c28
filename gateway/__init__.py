"""The gateway: it takes clients' requests, runs them in batches on the pipelines, and returns tokens.

`api` speaks HTTP and gRPC. `text` turns text into tokens and back. `schedule` decides what runs next (pure). `drive`
runs it on a mesh, over the streams of `session`. `engine.py` ties them together. Nothing here imports torch, or another
service.
"""
