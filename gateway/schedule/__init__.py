"""Which rows go into the next step, over which pages. Pure: no I/O, no clock; events in, plans out.

Whatever sends, waits or logs belongs into `drive`.
"""
