"""`stagemesh bench`: measures a mesh from outside, over its public API."""
