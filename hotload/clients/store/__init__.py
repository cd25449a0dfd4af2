"""The object store that snapshots and rollouts travel through."""
