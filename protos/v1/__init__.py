"""Version 1 of the messages, and the stubs made of them. Nothing here is written by hand but the .proto files."""
