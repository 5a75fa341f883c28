"""Code that several benchmarks use: facts of the machine, servers and clients, CPU time of processes, files of results.

Benchmarks do not belong here, and nothing that only one of them needs.
"""
