"""A policy version from the ranks of a trainer, without the engine: each publishes its shards."""

from hotload.clients.publish.copies import map_copy, read_copy
from hotload.clients.publish.publisher import ShardPublisher
from hotload.clients.store.store import Store

__all__ = ["ShardPublisher", "Store", "map_copy", "read_copy"]
