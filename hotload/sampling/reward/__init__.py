"""Rewards at work: in processes of their own, or asked for over HTTP."""
