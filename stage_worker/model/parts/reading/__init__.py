"""Reads parts off transformers' modules, by running them with random numbers in place of what linears, norms, experts
and attention compute.

Belongs here: how each kind of part is found. Does not belong here: what the parts are (description.py).
"""
