"""Compares stagemesh with vLLM and llama.cpp: `python -m benchmarks.peers`. README.md says how to set these up.

How the other systems are installed and started belongs here.
"""
