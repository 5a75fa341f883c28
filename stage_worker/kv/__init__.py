"""KV cache of a rank: pages, ranges of pages held by gateways, the boundary journal, copies of pages to other workers.

The modules in this folder do not compute steps.
"""
