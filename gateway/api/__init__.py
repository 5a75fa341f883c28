"""The APIs for clients: gRPC and HTTP, the internal request (`request.py`) and its builder, and the token log.

Nothing here knows pipelines, epochs or pages. An API passes a `GenerationRequest` to an `Engine` and reads `Delta`s.
"""
