"""Measurements for operators: metrics, stage times, records of steps.

Nothing here takes part in decisions.
"""
