"""The sampling engine: a running rollout, its draws and its groups."""
