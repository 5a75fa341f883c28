"""The `stagemesh` command: parses the command line into settings, and runs the service or command."""
