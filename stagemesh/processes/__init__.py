"""Processes of one machine: starting, watching and ending children, and the frames that processes exchange.

Nothing in here knows what a child is for: a child is given the name of a function to run.
"""
