"""Samples by other weights than were expected: two versions of them, which the spec keeps, drops or
masks from the change on, and weights that are none of this run's (protocol §12; design, rule 8).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hotload.identity import is_of_run, version_of
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Trajectory, Weights

OnStraddling = Literal["accept", "drop", "mask_from_change"]


def settle_weights(trajectory: Trajectory, policy: OnStraddling) -> Trajectory:
    """Treat a trajectory of several versions as `policy` wants it; one of a single version, or one
    that failed, comes back as it is.

    A dropped one is marked as failed and keeps its tokens, and so is, whatever the policy, one by
    weights that are no version of the run it was sent to. Masked tokens stay in their arrays with a
    loss mask of False. Where nobody knows which tokens came after the change (a rollout function
    made the segments itself), masking drops.
    """
    if trajectory.failure is not None:
        return trajectory
    sent_to = trajectory.provenance.identity
    strange = [one for one in trajectory.provenance.observed if not is_of_run(sent_to, one)]
    if strange and version_of(sent_to) is not None:
        detail = f"made by {strange[0]!r}, sent to {sent_to!r}"
        return replace(trajectory, failure=Cause.OTHER_WEIGHTS.value, detail=detail)
    if trajectory.weights is not Weights.STRADDLING:
        return trajectory
    if policy == "drop" or (policy == "mask_from_change" and not trajectory.provenance.runs):
        detail = f"{len(trajectory.provenance.observed)} versions of the weights made it"
        return replace(trajectory, failure=Cause.STRADDLING.value, detail=detail)
    if policy == "accept":
        return trajectory
    left = change_of(trajectory)
    segments = []
    for segment in trajectory.segments:
        kept = segment.loss_mask_T[:left]
        mask = kept + (False,) * (len(segment.loss_mask_T) - len(kept))
        segments.append(replace(segment, loss_mask_T=mask))
        left = max(0, left - len(mask))
    return replace(trajectory, segments=tuple(segments))


def masked_count(trajectory: Trajectory) -> int:
    """Count the tokens that masking took out of the loss, with what was said in between: those from
    the change on. None of a sample that had failed before, since its tokens are as they came.
    """
    mask = [kept for segment in trajectory.segments for kept in segment.loss_mask_T]
    after = mask[change_of(trajectory) :]
    return 0 if any(after) else len(after)


def change_of(trajectory: Trajectory) -> int:
    """Find, over the tokens of all segments, the first that other weights made than the first ones;
    the count of all tokens where none was reported.
    """
    runs = trajectory.provenance.runs
    changed = (start for start, identity in runs if identity and identity != runs[0][1])
    return next(changed, sum(len(segment.token_ids_T) for segment in trajectory.segments))
