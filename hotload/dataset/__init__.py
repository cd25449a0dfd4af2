"""Scored groups at rest: the plan of a rollout, its tables, claims and batches for a trainer."""
