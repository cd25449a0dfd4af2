"""Identities and manifests."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.errors import InvalidIdentityError, StoreError
from hotload.identity import (
    SnapshotKind,
    check_identity,
    cycle_name,
    is_identity,
    snapshot_identity,
    version_of,
)
from hotload.publish.snapshot import SnapshotManifest, batches, content_sha256
from hotload.records import FileDigest

MANIFEST = {
    "schema_number": 1,
    "identity": "run-000002-0123abcd",
    "run_id": "run",
    "policy_version": 2,
    "kind": "delta",
    "previous": "run-000001-0123abcd",
    "anchor": "run-000001-0123abcd",
    "chain_length": 1,
    "attempt": 0,
    "reason": "every replica serves it",
    "content_sha256": "0" * 64,
    "codec": "arc_v2",
    "checksum": "adler32",
    "shards": [
        {
            "file": "a.safetensors",
            "size_bytes": 3,
            "sha256": "1" * 64,
            "content_size_bytes": 9,
            "content_sha256": "2" * 64,
        }
    ],
    "side_files": [{"file": "config.json", "size_bytes": 2, "sha256": "3" * 64}],
    "created_at": "2026-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    "identity",
    [
        *("", "a/b", "..", ".", "a@b", "_x", ".x", "latest", "initial", "identities.json"),
        *("x.tmp", "a" * 129, "a b", "ä", "a\n", "a\0"),
    ],
)
def test_what_cannot_be_an_identity_is_refused(identity: str) -> None:
    assert not is_identity(identity)
    with pytest.raises(InvalidIdentityError):
        check_identity(identity)


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "a b", "x" * 97, "-a"])
def test_a_run_id_must_be_able_to_begin_an_identity(run_id: str) -> None:
    with pytest.raises(InvalidIdentityError):
        cycle_name(run_id, 1)


def test_the_identity_depends_on_every_fact_of_the_publication() -> None:
    facts = {
        "content_sha256": "0" * 64,
        "kind": SnapshotKind.DELTA,
        "previous": "run-000001-00000000",
        "attempt": 0,
    }
    changed = [
        {"content_sha256": "1" * 64},
        {"kind": SnapshotKind.FULL},
        {"previous": "run-000001-00000001"},
        {"attempt": 1},
    ]
    identities = {snapshot_identity("run", 2, **(facts | change)) for change in [{}, *changed]}
    assert len(identities) == 5
    assert snapshot_identity("run", 2, **facts) in identities
    assert all(check_identity(identity).startswith("run-000002-") for identity in identities)


def test_a_manifest_survives_rendering() -> None:
    manifest = SnapshotManifest.model_validate(MANIFEST)
    assert SnapshotManifest.parse(manifest.render(), identity=manifest.identity) == manifest
    assert (manifest.size_bytes, manifest.content_size_bytes) == (5, 9)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "../x"},
        {"previous": None},
        {"kind": "full"},
        {"chain_length": 0},
        {"codec": "none"},
        {"policy_version": -1},
        {"schema_number": 2},
        {"extra": 1},
        {"shards": [{"file": "../../etc/passwd"}]},
        {"shards": [MANIFEST["shards"][0] | {"file": "a/b"}]},
        {"content_sha256": "x"},
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        SnapshotManifest.parse(
            json.dumps(MANIFEST | change).encode(), identity="run-000002-0123abcd"
        )


def test_a_manifest_of_another_identity_is_refused() -> None:
    with pytest.raises(StoreError, match="names"):
        SnapshotManifest.parse(json.dumps(MANIFEST).encode(), identity="run-000003-0123abcd")


@pytest.mark.parametrize("data", [b"", b"null", b"{", b"[]", b"\xff"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(StoreError):
        SnapshotManifest.parse(data, identity="run-000002-0123abcd")


@given(st.integers(0, 500), st.integers(1, 60))
def test_batches_keep_order_and_limit(count: int, limit: int) -> None:
    shards = [FileDigest(file=str(n), size_bytes=n, sha256="0" * 64) for n in range(count)]
    made = batches(shards, limit)
    assert [shard for batch in made for shard in batch] == shards
    assert len(made) <= limit
    assert all(made)


def test_the_content_digest_does_not_depend_on_order() -> None:
    assert content_sha256({"a": "1", "b": "2"}) == content_sha256({"b": "2", "a": "1"})
    assert content_sha256({"a": "1", "b": "2"}) != content_sha256({"a": "2", "b": "1"})


@pytest.mark.parametrize(
    ("identity", "version"),
    [
        ("run-000012-0badf00d", 12),
        ("run-000012-0badf00d-x", None),
        ("other-000012-0badf00d", None),
        ("run-12-0badf00d", None),
        ("", None),
    ],
)
def test_the_version_an_identity_names(identity: str, version: int | None) -> None:
    assert version_of(identity, "run") == version


def test_the_version_an_identity_of_any_run_names() -> None:
    assert version_of("a-1-000012-0badf00d") == 12
    assert version_of("hand-made") is None
