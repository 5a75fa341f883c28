"""The transport over TCP: the wire format (`frame.py`), the two ends of a connection, and the transport itself.

There are no threads and no event loop: `progress()` drives non-blocking sockets with one epoll.
"""
