"""What is wanted of the mesh: small policies, each a pure function from the world to wishes.

A policy reads the world and the plan so far, and adds to the plan. It changes nothing else, orders nothing and waits
for nothing. The list of policies, with their order and its reasons, is in core/desired.py.
"""
