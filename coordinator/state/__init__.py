"""What outlives a coordinator, and which of several is the leader: the store, the Lease, fresh nonces."""
