"""The rank process: one thread that takes orders and plans, drives the links and runs steps.

No asyncio and no gRPC. Nothing of `agent` is imported.
"""
