"""The coordinator: who holds which layers. It reconciles, as Kubernetes' controllers do.

`observe` lets events change the `world`, `policy` says what is wanted of it, `core` orders what leads there, `planning`
does the arithmetic, `service` and `state` do the I/O.
"""
