"""A local hot-load service: a bucket goes in, real weights are served."""

__all__ = ["api", "control", "engine", "replicas", "server"]
