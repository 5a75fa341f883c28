"""Membership and leases, cost model, partition, placement, reconfiguration, and what outlives a restart."""
