"""Drives pipelines from epoch to epoch: sends plans, and takes results.

Accepted requests are in the ledger, which outlives epochs. A session does the I/O of one epoch. A driver decides which
session there is. Nothing here knows clients' protocols.
"""
