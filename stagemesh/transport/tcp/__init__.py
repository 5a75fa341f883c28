"""The transport over TCP: the bytes on a stream (`frame.py`), the two ends of a connection, and what drives them.

There are no threads and no event loop: `progress()` moves non-blocking sockets behind one epoll.
"""
