"""The baseline: kept, lost, damaged, rebuilt from the store; and what is planned without one."""

import json
import shutil
from pathlib import Path

import pytest

from hotload.clients.store.records import read_snapshot_manifest
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import sha256_file
from hotload.errors import BaselineLostError, StoreError, StoreUnavailableError
from hotload.identity import SnapshotKind
from hotload.publish.chain import plan_full
from hotload.publish.snapshot import ShardBatch, SnapshotManifest
from tasks.baseline import keep_baseline
from tasks.encode import encode_shards
from tasks.upload import adopt_snapshot
from tests.flows.fleet import REPLICAS
from tests.tasks.publishing import Publisher, contents, disk_full_after, flip_a_byte, stamps


async def hold(publisher: Publisher, version: int, manifest: SnapshotManifest) -> Path:
    return await publisher.baseline(version).hold(manifest)


async def chain_of(publisher: Publisher, count: int) -> list[SnapshotManifest]:
    return [await publisher.publish(version) for version in range(1, count + 1)]


def forget_the_trainer(publisher: Publisher) -> None:
    """From now on no checkpoint of the trainer's is on this machine."""
    publisher.fleet.checkpoints[:] = [publisher.work / "removed"] * 5


async def test_it_is_a_copy_of_what_is_served(publisher: Publisher) -> None:
    for version in (1, 2, 3):
        manifest = await publisher.publish(version)
        checkpoint = publisher.fleet.checkpoints[version]
        baseline = publisher.workspace.baseline(manifest.identity)
        assert contents(baseline) == contents(checkpoint)
        assert list(publisher.workspace.baselines.iterdir()) == [baseline]
        for path in baseline.iterdir():
            assert path.stat().st_ino != (checkpoint / path.name).stat().st_ino


@pytest.mark.parametrize("is_known", [True, False])
async def test_the_trainers_files_are_enough(publisher: Publisher, is_known: bool) -> None:
    await publisher.publish(1)
    second = await publisher.serve(2)
    shutil.rmtree(publisher.workspace.root)
    shutil.rmtree(publisher.fleet.bucket / second.identity)
    baseline = publisher.baseline(2)
    if is_known:
        for path in baseline.checkpoint.iterdir():
            baseline.digests.of(path)
    assert contents(await baseline.hold(second)) == contents(baseline.checkpoint)


async def test_trainers_files_changed_since_they_were_read_are_not_taken(
    publisher: Publisher,
) -> None:
    checkpoint = publisher.checkpoint_of_its_own(2)
    await publisher.publish(1)
    second = await publisher.serve(2)
    expected = contents(checkpoint)
    baseline = publisher.baseline(2)
    for path in checkpoint.iterdir():
        baseline.digests.of(path)
    flip_a_byte(checkpoint / second.shards[2].file)
    assert contents(await baseline.hold(second)) == expected


@pytest.mark.parametrize("harm", ["removed", "a file removed", "a byte flipped", "a shard cut"])
async def test_lost_or_damaged_it_is_rebuilt_from_the_store(
    publisher: Publisher, harm: str
) -> None:
    manifests = await chain_of(publisher, 3)
    expected = contents(publisher.fleet.checkpoints[3])
    forget_the_trainer(publisher)
    shutil.rmtree(publisher.workspace.deltas)
    baseline = publisher.workspace.baseline(manifests[-1].identity)
    shard = baseline / manifests[-1].shards[4].file
    if harm == "removed":
        shutil.rmtree(baseline)
    elif harm == "a file removed":
        (baseline / "config.json").unlink()
    elif harm == "a byte flipped":
        flip_a_byte(shard)
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    assert await hold(publisher, 3, manifests[-1]) == baseline
    assert contents(baseline) == expected
    assert list(publisher.workspace.baselines.iterdir()) == [baseline]


async def test_a_whole_ancestor_saves_the_way_from_the_full(publisher: Publisher) -> None:
    first, _ = await chain_of(publisher, 2)
    third = await publisher.serve(3)
    expected = contents(publisher.fleet.checkpoints[3])
    forget_the_trainer(publisher)
    for shard in first.shards:
        await publisher.store.delete_file(f"{first.identity}/{shard.file}")
    assert contents(await hold(publisher, 3, third)) == expected
    assert [path.name for path in publisher.workspace.baselines.iterdir()] == [third.identity]


async def test_a_new_machine_goes_on_with_a_delta(publisher: Publisher, tmp_path: Path) -> None:
    manifests = await chain_of(publisher, 2)
    other = publisher.elsewhere(tmp_path / "other")
    plan = await other.plan(3)
    assert (plan.kind, plan.previous) == (SnapshotKind.DELTA, manifests[-1].identity)
    await other.publish(3)
    assert publisher.fleet.served() == {plan.identity}
    assert [each["result"] for each in publisher.fleet.log()["snapshots"]["replica-1"]] == [
        "applied"
    ] * 3


async def test_the_same_over_s3(s3_publisher: Publisher, tmp_path: Path) -> None:
    manifests = await chain_of(s3_publisher, 2)
    other = s3_publisher.elsewhere(tmp_path / "other")
    plan = await other.plan(3)
    assert (plan.kind, plan.previous) == (SnapshotKind.DELTA, manifests[-1].identity)
    await other.publish(3)
    assert s3_publisher.fleet.served() == {plan.identity}


async def damage(publisher: Publisher, manifest: SnapshotManifest, how: str) -> None:
    path = f"{manifest.identity}/{manifest.shards[3].file}"
    stored = publisher.fleet.bucket / path
    if how == "removed":
        stored.unlink()
    elif how == "its manifest removed":
        await publisher.store.delete_file(f"_hotload/snapshots/{manifest.identity}.json")
    else:
        flip_a_byte(stored, -1 if how == "a byte flipped" else 20)


@pytest.mark.parametrize(
    "how", ["removed", "a byte flipped", "a header byte flipped", "its manifest removed"]
)
@pytest.mark.parametrize("damaged", [0, 1], ids=["the full", "the delta"])
async def test_not_even_in_the_store_means_a_full_that_says_so(
    publisher: Publisher, tmp_path: Path, how: str, damaged: int
) -> None:
    manifests = await chain_of(publisher, 3)
    await damage(publisher, manifests[damaged], how)
    other = publisher.elsewhere(tmp_path / "other")
    with pytest.raises(BaselineLostError, match=manifests[damaged].identity):
        await hold(other, 4, manifests[-1])
    plan = await other.plan(4)
    assert plan.kind is SnapshotKind.FULL
    assert f"baseline '{manifests[damaged].identity}' is lost" in plan.reason
    await other.publish(4)
    assert publisher.fleet.served() == {plan.identity}
    assert contents(other.workspace.baselines / plan.identity) == contents(
        publisher.fleet.checkpoints[4]
    )


async def test_a_served_snapshot_without_a_baseline_fails_no_cycle(
    publisher: Publisher, tmp_path: Path
) -> None:
    first = await publisher.publish(1)
    second = await publisher.serve(2)
    publisher.fleet.checkpoints[2] = publisher.work / "removed"
    await damage(publisher, second, "a byte flipped")
    shutil.rmtree(publisher.workspace.deltas)
    await keep_baseline.fn(publisher.baseline(2), second.identity)
    plan = await publisher.plan(3)
    assert plan.kind is SnapshotKind.FULL
    assert second.identity in plan.reason
    assert first.identity not in plan.reason


async def test_planning_again_keeps_what_was_encoded(publisher: Publisher) -> None:
    await publisher.publish(1)
    plan = await publisher.plan(2)
    content = publisher.content(2)
    with publisher.encoder(2, plan) as encoder:
        await encode_shards.fn(encoder, content.shards)
    encoded = stamps(publisher.workspace.delta(plan.identity))
    assert await publisher.plan(2) == plan
    assert stamps(publisher.workspace.delta(plan.identity)) == encoded


async def test_what_a_kill_left_is_removed(publisher: Publisher) -> None:
    first = await publisher.publish(1)
    second = await publisher.serve(2)
    for name in (f"{second.identity}.tmp", ".x.1234.retired", "run-000000-00000000"):
        (publisher.workspace.baselines / name).mkdir()
        (publisher.workspace.baselines / name / "file").write_text("half")
    await keep_baseline.fn(publisher.baseline(2), second.identity)
    assert [path.name for path in publisher.workspace.baselines.iterdir()] == [second.identity]
    assert [path.name for path in publisher.workspace.deltas.iterdir()] == [second.identity]
    assert first.identity != second.identity


async def test_a_full_disk_leaves_the_old_baseline(publisher: Publisher) -> None:
    first = await publisher.publish(1)
    second = await publisher.serve(2)
    ours = publisher.baseline(2)
    with disk_full_after(50_000):
        await keep_baseline.fn(ours, second.identity)
    assert [path.name for path in publisher.workspace.baselines.iterdir()] == [first.identity]
    before = publisher.fleet.checkpoints[1]
    assert contents(publisher.workspace.baseline(first.identity)) == contents(before)
    with pytest.raises(BaselineLostError, match="File too large"), disk_full_after(50_000):
        await hold(publisher, 2, second)
    await keep_baseline.fn(ours, second.identity)
    assert [path.name for path in publisher.workspace.baselines.iterdir()] == [second.identity]


async def test_an_unknown_snapshot_is_an_error(publisher: Publisher) -> None:
    with pytest.raises(StoreError, match="its manifest is gone from the store") as caught:
        await keep_baseline.fn(publisher.baseline(1), "run-000001-00000000")
    assert not isinstance(caught.value, StoreUnavailableError)


async def test_the_next_process_reads_nothing_of_a_baseline_that_nobody_touched(
    publisher: Publisher,
) -> None:
    """A delta's; a full's is read once, by the first delta after it."""
    for version in (1, 2, 3):
        await publisher.publish(version)
    workspace = publisher.workspace
    (baseline,) = workspace.baselines.iterdir()
    fresh = FileDigests(workspace.digests)
    known = {path.name: fresh.known(path) for path in baseline.iterdir()}
    assert known == {path.name: sha256_file(path) for path in baseline.iterdir()}
    shard = sorted(baseline.glob("*.safetensors"))[0]
    flip_a_byte(shard)
    assert FileDigests(workspace.digests).known(shard) is None
    published = await publisher.publish(4)
    assert published.kind is SnapshotKind.DELTA


async def test_what_two_services_share_is_remembered_when_one_of_them_has_gone(
    publisher: Publisher,
) -> None:
    for version in (1, 2):
        await publisher.publish(version)
    served = await publisher.serve(3)
    ours = publisher.baseline(3)
    # The same bytes under another service's name: a hard link of the first.
    twin = served.model_copy(update={"identity": "run-000003-00000001"})
    await ours.hold(served)
    await ours.hold(twin)
    await keep_baseline.fn(ours, served.identity)
    (baseline,) = publisher.workspace.baselines.iterdir()
    fresh = FileDigests(publisher.workspace.digests)
    assert all(fresh.known(path) == sha256_file(path) for path in baseline.iterdir())


@pytest.mark.parametrize("doubt", ["a full", "a damaged baseline"])
async def test_after_a_full_and_after_a_doubt_everything_is_read_again(
    publisher: Publisher, doubt: str
) -> None:
    for version in (1, 2):
        await publisher.publish(version)
    workspace = publisher.workspace
    assert json.loads(workspace.digests.read_bytes())
    if doubt == "a full":
        for number in range(REPLICAS):
            publisher.fleet.change_replicas(action="restart", replica=number, on_base=True)
        assert (await publisher.publish(3)).kind is SnapshotKind.FULL
    else:
        (baseline,) = workspace.baselines.iterdir()
        flip_a_byte(sorted(baseline.glob("*.safetensors"))[0])
        served = await read_snapshot_manifest(publisher.store, baseline.name)
        assert served is not None
        ours = publisher.baseline(2)
        await ours.hold(served)
        await keep_baseline.fn(ours, served.identity)
    assert not workspace.digests.exists()


async def test_what_another_service_serves_stays(publisher: Publisher) -> None:
    first, second = await chain_of(publisher, 2)
    fresh = publisher.baseline(2)
    fresh.reserved = {"acme/eu": frozenset({first.identity}), "acme/us": frozenset()}
    await publisher.baseline(1).hold(first)
    await fresh.hold(second)
    assert {path.name for path in publisher.workspace.baselines.iterdir()} == {
        first.identity,
        second.identity,
    }
    del fresh.reserved["acme/us"]
    await keep_baseline.fn(fresh, second.identity)  # eu has failed: its base is needed yet
    assert publisher.workspace.baseline(first.identity).is_dir()


async def test_of_one_content_in_two_words_each_snapshot_keeps_its_own(
    publisher: Publisher,
) -> None:
    await publisher.publish(1)
    checkpoint = publisher.in_other_words(2)
    delta = await publisher.serve(2)
    assert delta.kind is SnapshotKind.DELTA
    content = publisher.content(2)
    plan = plan_full(content, "test", run_id="run", policy_version=2)
    shards = ShardBatch.as_written(content.shards).shards
    full = SnapshotManifest.of(plan, content, shards, created_at=delta.created_at)
    assert full.content_sha256 == delta.content_sha256
    ours = publisher.baseline(2)
    served = await ours.hold(delta)
    assert contents(await ours.hold(full)) == contents(checkpoint) != contents(served)
    # Either is the content of that version.
    publisher.fleet.checkpoints[2] = served
    for words in (content, publisher.content(2)):
        adopt = adopt_snapshot.fn(
            publisher.store, words, publisher.spec(2), delta.identity, ours.digests
        )
        assert await adopt == delta


async def build_with_a_damaged_delta(publisher: Publisher, free_bytes: int) -> tuple[Path, Path]:
    """Let the baseline move on, with this much room, to a snapshot whose last delta cannot be
    had; where the one before it and its own are."""
    first = await publisher.publish(1)
    second = await publisher.serve(2)
    forget_the_trainer(publisher)
    last = max(shard.file for shard in second.shards)
    for place in (
        publisher.workspace.delta(second.identity),
        publisher.fleet.bucket / second.identity,
    ):
        flip_a_byte(place / last)
    usage = shutil._ntuple_diskusage(1 << 40, (1 << 40) - free_bytes, free_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        baseline = publisher.baseline(2)
        await baseline.hold(first)
        await keep_baseline.fn(baseline, second.identity)
    assert baseline.trouble is not None
    return publisher.workspace.baseline(first.identity), baseline.workspace.baseline(
        second.identity
    )


async def test_where_the_disk_has_room_the_base_stays_until_the_next_is_whole(
    publisher: Publisher,
) -> None:
    before, after = await build_with_a_damaged_delta(publisher, 1 << 30)
    assert len([*before.glob("*.safetensors")]) == 9
    assert not after.exists()


async def test_where_the_disk_is_short_the_base_is_spent_shard_by_shard(
    publisher: Publisher,
) -> None:
    before, after = await build_with_a_damaged_delta(publisher, 1 << 20)
    assert len([*before.glob("*.safetensors")]) == 1
    assert not after.exists()
