"""Code that several benchmarks use: facts of the machine, servers and clients, CPU time of processes, files of results.

Benchmarks do not belong here, nor code that only one of them needs.
"""
