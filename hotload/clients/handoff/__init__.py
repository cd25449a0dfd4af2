"""Scored groups for a trainer: several consumers share them, without the engine."""

from hotload.clients.handoff.reader import BlockingReader, Delivery, RolloutReader
from hotload.clients.store.store import Store

__all__ = ["BlockingReader", "Delivery", "RolloutReader", "Store"]
