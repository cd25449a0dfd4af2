"""Nodes that sample: parts of a rollout on other machines, found in the store and judged here."""

__all__ = ["coordinator", "notes", "share"]
