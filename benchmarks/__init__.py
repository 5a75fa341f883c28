"""Benchmarks: each a module to run from the repository's root, such as `python -m benchmarks.links`.

A benchmark of one file stands here, one of several in a room of its own. Each measures, writes JSON and Markdown below
`results/` with the machine, the versions and its own command, and says by its exit status whether what must hold held.
They are no part of the package that is installed.
"""
