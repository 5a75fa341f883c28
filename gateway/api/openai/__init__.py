"""OpenAI's API: request bodies, answers, events and errors in its JSON formats.

Sockets are not known here: `api/http` reads and writes.
"""
