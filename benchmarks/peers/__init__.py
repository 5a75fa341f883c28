"""Compares stagemesh with vLLM and llama.cpp: `python -m benchmarks.peers`. README.md says how to set them up.

This folder has all code that installs and starts the other systems.
"""
