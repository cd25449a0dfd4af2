"""Configured doors to the world: the service, the checkpoint store, the rollout client."""

__all__ = ["checkpoint_store", "hot_load_service", "rollout_client"]
