"""The definitions that the agent and its ranks share: frames, the start configuration, shared memory.

Both sides import these modules. They start nothing.
"""
