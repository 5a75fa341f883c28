"""The policies: small pure functions that decide how the mesh should be.

A policy reads the world and the plan so far, and adds to the plan. It changes nothing else, orders nothing and waits
for nothing. core/desired.py lists the policies in order, with the reasons for that order.
"""
