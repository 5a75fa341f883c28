"""From the world to the desired mesh, and from there to orders: desired, reconcile, and the steps of attempts.

Pure: no I/O, and the clock is an argument. The rules of single policies belong in `policy`.
"""
