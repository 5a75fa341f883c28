"""State that outlives a coordinator, and the choice of the leader: the store, the Lease, nonces."""
