"""Beside an inference server of your own: what makes it a replica of a hot-load service."""

__all__ = ["api", "beside", "door", "engines", "failures", "fleet", "loading", "server"]
