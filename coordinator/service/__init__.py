"""The coordinator's I/O: its gRPC service, the orders to workers, views of the mesh, gateways' slots.

Nothing is decided here: events go into the core, and its actions come out.
"""
