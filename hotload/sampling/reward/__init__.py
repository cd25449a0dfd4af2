"""Rewards at work: in processes of their own, or asked for over HTTP."""

__all__ = ["calls", "processes", "remote", "scorer", "user_errors", "worker"]
