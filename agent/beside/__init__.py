"""The agent's process: one replica with its engine, following the log of its fleet."""

__all__ = ["app", "engine_replica", "following", "offer", "peered_disk", "peers", "seal"]
