"""Sampling processes: parts of a rollout in event loops of their own, judged in one place."""

__all__ = ["child", "coordinator", "messages", "work", "worker"]
