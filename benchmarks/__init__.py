"""Benchmarks. Each is a module to run from the repository's root, such as `python -m benchmarks.links`.

A benchmark with one file is here, one with several files has a folder. Each writes JSON and Markdown to `results/`,
with the machine, the versions and its command. Its exit status says whether its goals were met. Benchmarks are not part
of the installed package.
"""
