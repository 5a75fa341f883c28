"""The APIs for clients: gRPC and HTTP, the internal request (`request.py`) and its builder, and the token log.

Pipelines, epochs and pages are not known here. A front hands a `GenerationRequest` to an `Engine` and reads `Delta`s.
"""
