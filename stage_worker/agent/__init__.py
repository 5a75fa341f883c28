"""The agent process: the Stage service, the lease, gateways' streams, and the group of rank processes.

It computes nothing. It imports neither torch nor anything from `rank`. It forwards plans and results unparsed.
"""
