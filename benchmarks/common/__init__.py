"""What several benchmarks need: facts of the machine, clients, a look at processes, how results are written.

No measurement of its own belongs here, and nothing that one benchmark alone needs.
"""
