"""`stagemesh bench`: traces the steps of a running mesh, and shows them as a table, a picture and a Chrome trace.

Measurements that users make of their own mesh belong here. This repository's own benchmarks are in `benchmarks/`.
"""
