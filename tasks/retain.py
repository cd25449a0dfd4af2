"""Retain: what a store keeps is decided from what is served now, then the rest is removed."""

from collections.abc import Sequence

from prefect import State, get_run_logger, task
from prefect.artifacts import acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from hotload.clients.service import HotLoadClient
from hotload.clients.service.served import read_served
from hotload.clients.store import Store, check_lease
from hotload.clients.store.retention import (
    read_old_cycles,
    read_pins,
    read_stored_snapshots,
    remove_cycles,
    remove_snapshots,
)
from hotload.identity import slug
from hotload.publish.lease import Lease
from hotload.publish.retention import Retention, decide_retention, sums_of
from hotload.spec import RetentionSpec
from tasks import RETRIED
from tasks.show import Progress, best_effort

ROWS_SHOWN = 500


@task(cache_policy=NO_CACHE, **RETRIED)
async def plan_retention(
    spec: RetentionSpec, services: Sequence[HotLoadClient], store: Store
) -> Retention:
    """Read what is served, pinned and stored, then decide what stays.

    Raises:
        ServiceUnavailableError, ServiceRefusedError: what a service serves cannot be known.
        StoreError: the store refuses.
    """
    pins = await read_pins(store)
    stored = await read_stored_snapshots(store)
    old_cycles = (
        () if spec.keep_reports is None else await read_old_cycles(store, spec.keep_reports)
    )
    # Asked last: what is served by now is already stored.
    served = await read_served(services, store.url)
    retention = decide_retention(
        stored,
        served=served,
        pins=pins,
        keep_versions=spec.keep_versions,
        grace_seconds=spec.grace_hours * 3600,
        old_cycles=old_cycles,
    )
    for line in (*retention.obstacles, *retention.notes):
        get_run_logger().warning("%s", line)
    return retention


@task(cache_policy=NO_CACHE, **RETRIED)
async def remove_unneeded(store: Store, retention: Retention, leases: Sequence[Lease]) -> None:
    """Remove what the plan says goes, as long as all leases are held.

    Raises:
        LeaseLostError: a publisher has taken over; nothing more is removed.
        StoreError: the store refuses.
    """
    # Three looks at the lease for every snapshot, and one for every old cycle.
    looks = 3 * len(retention.removed) + len(retention.old_cycles)
    progress = Progress(f"removing from {store.url}", looks)

    async def check() -> None:
        for lease in leases:
            await check_lease(store, lease)
        await progress.advance(1)

    await remove_snapshots(store, retention.removed, check)
    await remove_cycles(store, retention.old_cycles, check)


@task(cache_policy=NO_CACHE, task_run_name="show-retention-{spec.store}")
async def show_retention(spec: RetentionSpec, retention: Retention) -> None:
    """Show what stays and what goes as the next version of the store's artifact."""
    rows = [
        {
            "snapshot": row.snapshot.identity,
            "kind": row.snapshot.kind.value if row.snapshot.kind else "",
            "bytes": row.snapshot.size_bytes,
            "stays": row.is_kept,
            "why": row.reason,
        }
        for row in sorted(retention.rows, key=lambda row: row.is_kept)
    ]
    with best_effort():
        await acreate_table_artifact(
            rows[:ROWS_SHOWN],
            key=slug(f"hotload-retention-{spec.store}"),
            description=_words(spec, retention),
        )


def retained(spec: RetentionSpec, retention: Retention) -> State[Retention]:
    """Make the state of the flow run: what went or would go, or that nothing could."""
    name = "HeldBack" if retention.obstacles else "Removed" if spec.delete else "DryRun"
    return Completed(name=name, message=_words(spec, retention), data=retention)


def _words(spec: RetentionSpec, retention: Retention) -> str:
    sums = sums_of(retention, is_done=spec.delete, price_per_gb_month=spec.price_per_gb_month)
    return "; ".join([sums, *retention.obstacles])
