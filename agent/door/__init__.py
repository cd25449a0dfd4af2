"""The door of a fleet of agents: the hot-load API, with no memory but the log in the store."""

__all__ = [
    "agent_fleet",
    "app",
    "canary",
    "gate_file",
    "gate_verdict",
    "in_process",
    "sample_gate",
    "seen",
]
