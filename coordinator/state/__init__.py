"""What outlives a coordinator, and which of several is the leader: the store, leader locks, fresh nonces."""
