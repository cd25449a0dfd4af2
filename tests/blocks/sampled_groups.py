"""Sampled groups in a store, for those who read them in steps."""

from __future__ import annotations

import hashlib

from hotload.clients.store import Store
from hotload.dataset.parquet import render_rollouts
from hotload.dataset.rollout_plan import PartNotes, RolloutPart
from hotload.dataset.table import rollouts_frame
from hotload.rollout.counts import GroupCounts, count_groups
from tests.factories import rollout_manifest, scored_group, segment, trajectory

SHA = "0" * 64
POSITIONS = {name: place for place, name in enumerate("abcdefgh")}


async def sampled(
    store: Store,
    version: int,
    *parts: str,
    is_complete: bool = True,
    rules: GroupCounts | None = None,
) -> list[RolloutPart]:
    """Parts of a version, of problems named by letters; a capital one teaches nothing."""
    identity, written = f"run-{version:06d}-0123abcd", []
    for number, letters in enumerate(parts):
        groups = [
            scored_group(
                *(
                    trajectory(segment((5, 6 + n)), number=n, problem_id=one.lower())
                    for n in (0, 1)
                ),
                rewards=[1.0, 1.0] if one.isupper() else [0.0, 1.0],
                mark="uniform" if one.isupper() else None,
            )
            for one in letters
        ]
        frame = rollouts_frame(groups, run_id="run", policy_version=version)
        data = render_rollouts(frame, digest=SHA)
        file = f"part-{number:05d}-00.parquet"
        await store.put_bytes(data, f"_hotload/rollouts/{identity}/{file}")
        notes = PartNotes(**dict(count_groups(groups, rules or GroupCounts(), run_id="run")))
        sha256 = hashlib.sha256(data).hexdigest()
        written.append(notes.part(file=file, size_bytes=len(data), sha256=sha256, digest=SHA))
    manifest = rollout_manifest(identity, written, is_complete=is_complete)
    await store.put_bytes(manifest.render(), f"_hotload/rollouts/{identity}/manifest.json")
    return written
