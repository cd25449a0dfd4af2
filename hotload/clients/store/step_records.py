"""Reading and writing what a training run leaves in the store.

_hotload/training/<run>/steps/000000007.json    the record of a step, written once
_hotload/training/<run>/promoted/<name>.json    a name for one of its versions, given once
_hotload/training/<run>/states/                 which states are removed, or a branch begins with
_hotload/training/<run>/page.html               its steps to look at
"""

from hotload.clients.store.records import READ_CONCURRENCY, read_published
from hotload.clients.store.store import Store
from hotload.concurrently import overlap
from hotload.errors import IdentityConflictError, InvalidIdentityError
from hotload.identity import cycle_name
from hotload.training.step_record import STEP_RECORD_LIMIT_BYTES, Promotion, StepRecord

TRAINING = "_hotload/training"


async def read_steps(store: Store, run_id: str) -> list[StepRecord]:
    """Read every step record of a run, in order.

    Raises:
        StoreError: one cannot be read, or the store refuses.
    """
    directory = f"{TRAINING}/{run_id}/steps"
    names = [name for name in await store.names(directory) if name.endswith(".json")]
    records: list[StepRecord] = []
    for start in range(0, len(names), READ_CONCURRENCY):
        some = names[start : start + READ_CONCURRENCY]
        records += await overlap(_read(store, f"{directory}/{name}") for name in some)
    return records


async def read_step(store: Store, run_id: str, step: int) -> StepRecord | None:
    """Read the record of one step, whatever there is of the others; None where there is none.

    Raises:
        StoreError: it cannot be read, or the store refuses.
    """
    path = _path(run_id, step)
    return None if await store.size(path) is None else await _read(store, path)


async def _read(store: Store, path: str) -> StepRecord:
    data = await store.read_bytes(path, limit_bytes=STEP_RECORD_LIMIT_BYTES)
    return StepRecord.parse(data, path=f"{store.url}/{path}")


def _path(run_id: str, step: int) -> str:
    return f"{TRAINING}/{run_id}/steps/{step:09d}.json"


async def write_step(store: Store, record: StepRecord) -> None:
    """Write the record of a step unless there is one.

    Raises:
        IdentityConflictError: there is another: a second loop of the run is at work.
        StoreError: the store refuses.
    """
    path = _path(record.run_id, record.step)
    if await store.create_bytes(record.render(), path):
        return
    if await _read(store, path) != record:
        reason = f"another loop of this run has recorded step {record.step}: stop one of the two"
        raise IdentityConflictError(record.run_id, reason)


def training_page_path(run_id: str) -> str:
    """Name the object in which the page of a training run lies."""
    return f"{TRAINING}/{run_id}/page.html"


async def read_promotions(store: Store, run_id: str) -> list[Promotion]:
    """Read the names that were given to versions of a run.

    Raises:
        StoreError: one cannot be read, or the store refuses.
    """
    directory = f"{TRAINING}/{run_id}/promoted"
    paths = [f"{directory}/{name}" for name in await store.names(directory)]
    return await overlap(_read_promotion(store, path) for path in paths)


async def promote(
    store: Store, run_id: str, name: str, policy_version: int | None = None
) -> Promotion:
    """Give a published version of a run a name, once; its last version if none is said.

    Raises:
        InvalidIdentityError: no step exported the version, or it was not published.
        IdentityConflictError: the name stands for another version.
        StoreError: the store refuses.
    """
    exports = {
        record.checkpoint.policy_version: (record.step, record.checkpoint)
        for record in await read_steps(store, run_id)
        if record.checkpoint is not None
    }
    version = max(exports, default=None) if policy_version is None else policy_version
    if version not in exports:
        found = f"exported {', '.join(map(str, exports)) or 'none'}"
        raise InvalidIdentityError(run_id, f"no step exported version {version}: {found}")
    step, checkpoint = exports[version]
    published = await read_published(store, cycle_name(run_id, version))
    if not published:
        raise InvalidIdentityError(run_id, f"version {version} was not published")
    promotion = Promotion(
        name=name,
        run_id=run_id,
        step=step,
        policy_version=version,
        identity=published[-1].identity,
        content_sha256=checkpoint.content_sha256,
    )
    path = f"{TRAINING}/{run_id}/promoted/{name}.json"
    if not await store.create_bytes(promotion.model_dump_json(indent=1).encode(), path):
        earlier = await _read_promotion(store, path)
        if earlier.policy_version != version:
            reason = f"{name!r} stands for version {earlier.policy_version}: choose another name"
            raise IdentityConflictError(run_id, reason)
        return earlier
    return promotion


async def _read_promotion(store: Store, path: str) -> Promotion:
    data = await store.read_bytes(path, limit_bytes=STEP_RECORD_LIMIT_BYTES)
    return Promotion.parse_stored(data, path)
