"""Scored groups at rest: the plan of a rollout, its tables, claims and batches for a trainer."""

__all__ = [
    "claims",
    "logprob_drift",
    "parquet",
    "part_progress",
    "rollout_plan",
    "sample_extracts",
    "table",
    "trainer_batch",
]
