"""The coordinator: it decides which worker holds which layers. It reconciles, as Kubernetes' controllers do.

`observe` applies events to the `world`. `policy` decides how the mesh should be. `core` orders the changes that lead
there. `planning` does the arithmetic. `service` and `state` do the I/O.
"""
