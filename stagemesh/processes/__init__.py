"""Processes of one machine: starting, watching and ending children, and the frames that processes exchange.

This folder does not know the purpose of a child: a child gets the name of a function to run.
"""
