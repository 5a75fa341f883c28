"""OpenAI's shapes: requests checked, answers and errors as its clients expect them.

No sockets in here: `api/http` reads and writes.
"""
