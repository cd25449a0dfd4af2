"""The baseline: kept, lost, damaged, rebuilt from the store; and what is planned without one."""

import shutil
from pathlib import Path

import pytest

from hotload.errors import BaselineLostError, StoreError, StoreUnavailableError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import SnapshotManifest
from tasks.baseline import keep_baseline
from tasks.encode import encode_shards
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
