"""The `stagemesh` command: what is typed, read into settings, and handed to the service or command that it names."""
