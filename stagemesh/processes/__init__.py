"""Processes of one machine: how a parent starts, watches and ends its children, and the frames that they exchange.

Nothing in here knows what a child is for: it is told a function to run.
"""
