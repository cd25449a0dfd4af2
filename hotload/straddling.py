"""Samples that two versions of the weights made: kept, dropped, or masked from the change on
(protocol §12).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hotload.faults import Cause
from hotload.trajectories import Trajectory, Weights

OnStraddling = Literal["accept", "drop", "mask_from_change"]


def settle_straddling(trajectory: Trajectory, policy: OnStraddling) -> Trajectory:
    """The trajectory as `policy` wants it; one that does not straddle, or failed, comes back as it
    is.

    A dropped one is marked as failed and keeps its tokens. Masked tokens stay in their arrays with
    a loss mask of False. Where nobody knows which tokens came after the change (a rollout function
    made the segments itself), masking drops.
    """
    if trajectory.failure is not None or trajectory.weights is not Weights.STRADDLING:
        return trajectory
    if policy == "drop" or (policy == "mask_from_change" and not trajectory.provenance.runs):
        told = f"{len(trajectory.provenance.observed)} versions of the weights made it"
        return replace(trajectory, failure=Cause.STRADDLING.value, detail=told)
    if policy == "accept":
        return trajectory
    left = change_of(trajectory)
    masks: list[tuple[bool, ...]] = []
    for segment in trajectory.segments:
        kept = segment.loss_mask_T[:left]
        masks.append(kept + (False,) * (len(segment.loss_mask_T) - len(kept)))
        left = max(0, left - len(segment.loss_mask_T))
    further = zip(trajectory.further, masks[1:], strict=True)
    return replace(
        trajectory,
        loss_mask_T=masks[0],
        further=tuple(replace(segment, loss_mask_T=mask) for segment, mask in further),
    )


def change_of(trajectory: Trajectory) -> int:
    """The number, over the tokens of all segments, of the first token that other weights made than
    the first ones; the count of all tokens where none was told.
    """
    runs = trajectory.provenance.runs
    changed = (start for start, identity in runs if identity and identity != runs[0][1])
    return next(changed, sum(len(segment.token_ids_T) for segment in trajectory.segments))
