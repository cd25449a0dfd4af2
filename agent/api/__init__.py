"""The hot-load API over any service (protocol §2-§8)."""

__all__ = ["gateway", "hot_load"]
