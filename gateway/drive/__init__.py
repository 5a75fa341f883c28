"""Drives pipelines: plans out, results in, from epoch to epoch.

What was accepted lives in the ledger and outlives epochs; a session does I/O at one epoch; a driver decides which
session there is. Clients' protocols are not known here.
"""
