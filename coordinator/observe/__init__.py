"""Events change the world: registrations, answers to orders, reports of gateways, operators' wishes, time.

Nothing in here decides what follows, and nothing is ordered.
"""
