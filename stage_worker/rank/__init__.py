"""The rank process: one thread that takes orders and plans, drives the links and runs steps.

The modules in this folder use neither asyncio nor gRPC, and import nothing from `agent`.
"""
