"""The door of a fleet of agents: the hot-load API, with no memory but the log in the store."""

__all__ = ["agent_fleet", "app", "canary", "in_process", "seen"]
