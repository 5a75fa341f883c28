"""Decides which rows go into the next step, and which pages they use. Pure: no I/O, no clock; events in, plans out.

Code that sends, waits or logs belongs in `drive`.
"""
