"""OpenAI's API: request bodies, answers, events and errors in its JSON formats.

Nothing here knows sockets: `api/http` reads and writes.
"""
