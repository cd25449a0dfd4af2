"""Configured doors to the world: the service, the checkpoint store, the rollout client."""
