"""The `stagemesh` command: its arguments, and the commands that are answered at once.

What a service does belongs to the service, which is imported when its command is given: `--help` must be quick.
"""
