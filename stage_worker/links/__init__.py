"""Activation links between two ranks, over any transport: the handshake, lanes with credits, their words on the wire.

What the bytes mean is the assignment's business.
"""
