"""A model's layers as lists of known parts, and where its parameters are in a checkpoint.

Belongs here: what the parts are, and their form as JSON; `reading` finds them. Does not belong here: how a kernel
computes a part.
"""
