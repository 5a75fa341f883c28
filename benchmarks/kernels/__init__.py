"""What the compiled kernels of a CPU cost, without a mesh.

Belongs here: linears and decode steps on one core. Does not belong here: what a server does (the folder above).
"""
