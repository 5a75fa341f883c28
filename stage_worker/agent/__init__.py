"""The agent process: the Stage service, the lease, gateways' streams, and the group of rank processes.

It computes nothing, imports neither torch nor anything of `rank`, and passes plans and results on unparsed.
"""
