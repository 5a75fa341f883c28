"""Every message and RPC between processes that may be on two machines, versioned `stagemesh.v1`.

`generate.py` makes the stubs.
"""
