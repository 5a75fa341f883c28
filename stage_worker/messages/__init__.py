"""What the agent and its ranks exchange: frames, the start configuration, memory that they share.

Nothing in here acts; both sides import it.
"""
