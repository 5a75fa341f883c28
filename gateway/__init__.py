"""The gateway: clients' requests in, batches over the pipelines, tokens back.

`api` speaks HTTP and gRPC, `text` turns text into tokens and back, `schedule` decides what runs next (pure), `drive`
runs it on a mesh. `engine.py` ties them together. Nothing in here imports torch, or another service.
"""
