"""What operators can measure: metrics, stage times, records of steps.

Nothing here takes part in decisions.
"""
