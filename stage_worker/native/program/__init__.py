"""The operations of the compiled kernels for one layer, and how a layer's parts become them.

Belongs here: what is computed from which buffer into which. Does not belong here: weights in memory, and kernels.
"""
