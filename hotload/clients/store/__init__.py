"""The bucket that snapshots and rollouts travel through, on any kind of object store."""

from hotload.clients.store.publisher_leases import check_lease, every_lease, publisher_lease
from hotload.clients.store.store import Store, check_url

__all__ = ["Store", "check_lease", "check_url", "every_lease", "publisher_lease"]
