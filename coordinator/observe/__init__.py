"""Applies events to the world: registrations, answers to orders, gateways' reports, operators' requests, time.

Nothing here decides what follows, and nothing gives orders.
"""
