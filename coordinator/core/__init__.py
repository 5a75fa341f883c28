"""From the world to what is wanted of it, and from there to orders: desired, reconcile, and how attempts go on.

Pure: no I/O, and the clock is an argument. What one policy wants belongs into `policy`.
"""
