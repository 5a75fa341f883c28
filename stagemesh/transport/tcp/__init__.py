"""TCP: the bytes on a stream (`frame.py`), the two ends of a connection, and the transport that drives them.

No threads, no event loop and no asyncio: sockets behind one epoll, moved by `progress()`.
"""
