"""What is measured of the gateway and told to operators: metrics, stage times, records of steps.

Nothing in here decides anything.
"""
