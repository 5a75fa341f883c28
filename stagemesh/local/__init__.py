"""`stagemesh serve`: which processes make a mesh on this machine, and the supervisor that keeps them running."""
