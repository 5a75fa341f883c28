"""KV cache of a rank: pages, ranges of pages held by gateways, the boundary journal, copies of pages to other workers.

Modules here compute no steps.
"""
