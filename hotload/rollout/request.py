"""One request for one answer: the same over all its attempts, and after a restart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from hotload.options import Sampling
from hotload.rollout.trajectory import Problem, sample_seed


@dataclass(frozen=True, slots=True)
class Request:
    """One turn of one sample: the same over all its attempts, and after a restart.

    `identity` is the one the service was confirmed to serve. All turns share `session_id`, so that
    the replica that holds their common prefix answers them all.
    """

    problem: Problem
    sampling: Sampling
    identity: str
    sample_number: int
    seed: int
    request_id: str
    session_id: str
    is_hedge: bool = False
    """Sent beside a request that is still under way, in a session of its own, so that another
    replica may answer."""

    def turn(self, number: int, question: Problem, sampling: Sampling) -> Request:
        """Return the request of turn `number`, counted from 0; this is the request of turn 0."""
        return replace(
            self,
            problem=question,
            sampling=sampling,
            seed=(self.seed + number) % 2**31,
            request_id=f"{self.request_id}-{number}" if number else self.request_id,
        )


def first_request(
    problem: Problem,
    sample_number: int,
    *,
    sampling: Sampling,
    identity: str,
    policy_version: int,
    is_hedge: bool = False,
) -> Request:
    """Return the request that begins a sample; the same facts always give the same one."""
    seed = sample_seed(sampling.seed, problem.id, policy_version, sample_number)
    facts = [identity, problem.id, sample_number, seed, *(["hedge"] if is_hedge else [])]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Request(
        problem=problem,
        sampling=sampling,
        identity=identity,
        sample_number=sample_number,
        seed=seed,
        request_id=f"r-{digest[:32]}",
        session_id=f"s-{digest[32:]}",
        is_hedge=is_hedge,
    )
