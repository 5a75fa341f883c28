"""stagemesh beside vLLM and llama.cpp: `python -m benchmarks.peers` (README.md says how to set the others up).

How the other systems are installed and started is here, and nowhere else.
"""
