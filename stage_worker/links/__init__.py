"""Activation links between two ranks, over any transport: the handshake, lanes with credits, the wire format.

The assignment decides what the bytes mean.
"""
