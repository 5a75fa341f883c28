"""What clients speak: the request vocabulary (`request.py`), its one builder, the gRPC and HTTP fronts, the token log.

Nothing in here knows of pipelines, epochs or pages: it hands a `GenerationRequest` to an `Engine` and reads deltas.
"""
