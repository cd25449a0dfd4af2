"""plan_next, read_chain, may_signal and the transition table."""

from datetime import UTC, datetime

import pytest

from hotload.errors import (
    ChainBrokenError,
    IdentityConflictError,
    InvalidIdentityError,
    LoadFailedError,
    ServiceUnavailableError,
)
from hotload.identity import SnapshotKind
from hotload.options import Cadence
from hotload.publish.chain import (
    TRANSITIONS,
    Chain,
    ChainEvent,
    ChainState,
    PublishAttempt,
    full_instead,
    may_signal,
    next_attempt,
    plan_full,
    plan_next,
    read_chain,
)
from hotload.publish.readiness import ReplicaStatus, ServiceStatus
from hotload.publish.snapshot import (
    CheckpointContent,
    ShardBatch,
    SnapshotManifest,
    SnapshotPlan,
)
from hotload.records import FileDigest

DIGEST = "ab" * 32
CONTENT = CheckpointContent(
    kind=SnapshotKind.FULL,
    shards=(FileDigest(file="a.safetensors", size_bytes=10, sha256=DIGEST),),
    side_files=(),
)
OTHER_CONTENT = CheckpointContent(
    kind=SnapshotKind.FULL,
    shards=(FileDigest(file="a.safetensors", size_bytes=10, sha256="cd" * 32),),
    side_files=(),
)
ADAPTER = CheckpointContent(kind=SnapshotKind.LORA, shards=CONTENT.shards, side_files=())


def manifest_of(plan: SnapshotPlan, content: CheckpointContent = CONTENT) -> SnapshotManifest:
    return SnapshotManifest.of(plan, content, (), datetime(2026, 1, 1, tzinfo=UTC))


def full_of(version: int = 5, content: CheckpointContent = CONTENT) -> SnapshotPlan:
    return plan_full(content, "first", run_id="run", policy_version=version)


HEAD = manifest_of(full_of(4))


def serving(*identities: str | None, **fields: object) -> ServiceStatus:
    return ServiceStatus(tuple(ReplicaStatus(True, one, **fields) for one in identities))


def plan(
    chain: Chain,
    attempts: list[PublishAttempt] | None = None,
    *,
    version: int = 5,
    content: CheckpointContent = CONTENT,
    **cadence: object,
) -> SnapshotPlan:
    return plan_next(
        chain,
        attempts or [],
        content,
        run_id="run",
        policy_version=version,
        cadence=Cadence.model_validate(cadence),
    )


CHAINED = read_chain(serving(HEAD.identity, HEAD.identity), HEAD, [])
DELTA = plan(CHAINED)


def test_the_first_snapshot_is_full() -> None:
    first = plan(read_chain(serving(None, None), None, []))
    assert first.kind is SnapshotKind.FULL
    assert first.previous is None
    assert (first.anchor, first.chain_length) == (first.identity, 0)


def test_a_delta_follows_what_every_replica_serves() -> None:
    assert DELTA.kind is SnapshotKind.DELTA
    assert (DELTA.previous, DELTA.anchor) == (HEAD.identity, HEAD.identity)
    assert DELTA.chain_length == 1
    assert DELTA.identity.startswith("run-000005-")


def test_the_same_facts_give_the_same_plan() -> None:
    assert plan(CHAINED) == DELTA


@pytest.mark.parametrize(
    ("length", "full_every", "kind"),
    [(18, 20, "delta"), (19, 20, "full"), (0, 1, "full"), (0, 2, "delta")],
)
def test_the_cadence_forces_a_full(length: int, full_every: int, kind: str) -> None:
    head = HEAD if length == 0 else replace_chain(length)
    chain = Chain(ChainState.CHAINED, head)
    assert plan(chain, full_every=full_every).kind == kind


def replace_chain(length: int) -> SnapshotManifest:
    return manifest_of(DELTA.model_copy(update={"chain_length": length, "policy_version": 4}))


def test_force_full_says_so() -> None:
    forced = plan(CHAINED, force_full=True)
    assert (forced.kind, forced.reason) == (SnapshotKind.FULL, "force_full is set")


def test_an_obstacle_turns_the_delta_into_a_full_and_is_the_reason() -> None:
    obstacle = "shard files changed: x"
    full = full_instead(DELTA, CONTENT, obstacle)
    assert full == full_of().model_copy(update={"reason": obstacle})


def test_an_adapter_is_never_a_delta_and_keeps_the_interval() -> None:
    assert plan(CHAINED, content=ADAPTER).kind is SnapshotKind.LORA
    published = manifest_of(plan(CHAINED, content=ADAPTER, version=4), ADAPTER)
    chain = Chain(ChainState.CHAINED, published)
    assert plan(chain, content=ADAPTER).kind is SnapshotKind.LORA
    assert plan(chain, content=ADAPTER, weight_sync_interval=4).identity == published.identity


@pytest.mark.parametrize(("version", "due"), [(4, True), (5, False), (8, True)])
def test_versions_between_the_interval_plan_what_is_served(version: int, due: bool) -> None:
    older = HEAD.model_copy(update={"policy_version": 0})
    chain = Chain(ChainState.CHAINED, older)
    planned = plan(chain, version=version, weight_sync_interval=4)
    assert (planned.identity != HEAD.identity) == due


def test_interval_zero_still_publishes_the_first() -> None:
    first = plan(Chain(ChainState.NEED_FULL), weight_sync_interval=0)
    assert first.kind is SnapshotKind.FULL
    assert plan(CHAINED, weight_sync_interval=0).identity == HEAD.identity


def test_an_older_version_of_the_run_is_refused() -> None:
    with pytest.raises(InvalidIdentityError, match="already serves version 4"):
        plan(CHAINED, version=3)


def test_other_content_under_the_same_version_is_refused() -> None:
    published = manifest_of(DELTA, OTHER_CONTENT)
    with pytest.raises(IdentityConflictError, match="other content"):
        plan(CHAINED, [PublishAttempt(published, signalled=False)])


def test_a_version_is_of_what_its_trainer_wrote_and_of_what_is_restored_of_it() -> None:
    shards = ShardBatch.as_written(CONTENT.shards).shards
    published = SnapshotManifest.of(DELTA, OTHER_CONTENT, shards, HEAD.created_at)
    # A way back to it has what was restored, in both.
    back = SnapshotManifest.of(
        DELTA.model_copy(update={"identity": "run-000005-00000001"}),
        CONTENT,
        shards,
        HEAD.created_at,
    )
    attempts = [PublishAttempt(one, signalled=False) for one in (published, back)]
    for content in (CONTENT, OTHER_CONTENT):
        assert plan(CHAINED, attempts, content=content) == DELTA
    third = CheckpointContent(kind=SnapshotKind.FULL, shards=(), side_files=())
    with pytest.raises(IdentityConflictError, match=published.identity):
        plan(CHAINED, attempts, content=third)


def attempt(signalled: bool, planned: SnapshotPlan = DELTA) -> list[PublishAttempt]:
    return [PublishAttempt(manifest_of(planned), signalled)]


def test_an_unsignalled_delta_is_resumed_while_the_replicas_stay() -> None:
    attempts = attempt(signalled=False)
    chain = read_chain(serving(HEAD.identity), HEAD, attempts)
    assert plan(chain, attempts) == DELTA


def test_an_unsignalled_delta_is_dropped_once_a_replica_has_left() -> None:
    attempts = attempt(signalled=False)
    chain = read_chain(serving(HEAD.identity, None), None, attempts)
    assert plan(chain, attempts).kind is SnapshotKind.FULL


def test_a_stored_full_is_taken_by_whom_it_was_not_signalled_and_who_needs_one() -> None:
    stored = full_of()
    attempts = attempt(signalled=False, planned=stored)
    needed = plan(read_chain(serving(None), None, attempts), attempts)
    assert (needed.identity, needed.reason[-20:]) == (stored.identity, "it lies in the store")
    chained = read_chain(serving(HEAD.identity), HEAD, attempts)
    assert plan(chained, attempts) == DELTA
    assert full_instead(DELTA, CONTENT, "lost", attempts).identity == stored.identity


def test_a_full_that_failed_is_not_taken_from_the_store() -> None:
    failed = full_of()
    attempts = attempt(signalled=True, planned=failed)
    status = serving(None, stage="error", target_identity=failed.identity)
    again = plan(read_chain(status, None, attempts), attempts)
    assert (again.kind, again.attempt) == (SnapshotKind.FULL, 1)
    assert again.identity != failed.identity


def test_what_another_service_was_sent_last_is_no_doubt_here() -> None:
    """A service that took the delta stays with it, whatever full followed it elsewhere."""
    attempts = [*attempt(signalled=True), *attempt(signalled=False, planned=full_of())]
    chain = read_chain(serving(DELTA.identity), manifest_of(DELTA), attempts)
    assert plan(chain, attempts) == DELTA


def test_no_identity_is_made_twice_for_another_service() -> None:
    """The number counts what this service was sent; what lies there under it is passed over."""
    elsewhere = plan_full(CONTENT, "", run_id="run", policy_version=5)
    other = manifest_of(elsewhere).model_copy(update={"kind": SnapshotKind.LORA})
    again = plan_full(
        CONTENT, "", run_id="run", policy_version=5, attempts=[PublishAttempt(other, False)]
    )
    assert (again.attempt, again.identity == elsewhere.identity) == (1, False)


def test_a_delta_that_is_loading_is_waited_for() -> None:
    attempts = attempt(signalled=True)
    status = ServiceStatus(
        (
            ReplicaStatus(True, DELTA.identity),
            ReplicaStatus(True, HEAD.identity, "downloading", DELTA.identity),
        )
    )
    chain = read_chain(status, None, attempts)
    assert chain.state is ChainState.LOADING
    assert plan(chain, attempts) == DELTA


def test_a_delta_that_is_served_is_adopted() -> None:
    attempts = attempt(signalled=True)
    chain = read_chain(serving(DELTA.identity, DELTA.identity), None, attempts)
    assert chain.state is ChainState.CHAINED
    assert plan(chain, attempts) == DELTA


def test_a_delta_in_error_is_never_sent_again() -> None:
    attempts = attempt(signalled=True)
    status = serving(HEAD.identity, stage="error", target_identity=DELTA.identity)
    again = plan(read_chain(status, HEAD, attempts), attempts)
    assert (again.kind, again.attempt) == (SnapshotKind.FULL, 1)
    assert again.identity != full_of().identity


def test_a_delta_whose_signal_is_in_doubt_becomes_a_full() -> None:
    attempts = attempt(signalled=True)
    chain = read_chain(serving(HEAD.identity), HEAD, attempts)
    assert chain.state is ChainState.UNCLEAR
    assert plan(chain, attempts).kind is SnapshotKind.FULL


def test_a_full_whose_signal_is_in_doubt_is_signalled_again() -> None:
    full = full_of()
    attempts = attempt(signalled=True, planned=full)
    chain = read_chain(serving(None), None, attempts)
    assert chain.state is ChainState.UNCLEAR
    assert plan(chain, attempts) == full


def test_a_stale_error_about_another_identity_is_ignored() -> None:
    status = serving(HEAD.identity, stage="error", target_identity="run-000003-00000000")
    assert read_chain(status, HEAD, []).state is ChainState.CHAINED


def test_a_delta_may_be_signalled_only_on_its_previous() -> None:
    delta = manifest_of(DELTA)
    assert may_signal(serving(HEAD.identity, HEAD.identity), delta)
    assert not may_signal(serving(HEAD.identity, DELTA.identity), delta)
    with pytest.raises(ChainBrokenError, match="base weights on 1"):
        may_signal(serving(HEAD.identity, None), delta)
    with pytest.raises(LoadFailedError):
        may_signal(serving(HEAD.identity, stage="error", target_identity=DELTA.identity), delta)


@pytest.mark.parametrize("planned", [DELTA, full_of()], ids=["delta", "full"])
def test_a_service_without_replicas_is_not_signalled(planned: SnapshotPlan) -> None:
    with pytest.raises(ServiceUnavailableError, match="the replica list is empty"):
        may_signal(ServiceStatus(()), manifest_of(planned))


def test_a_full_may_be_signalled_on_anything() -> None:
    assert may_signal(serving("someone-elses", None), HEAD)


def test_no_delta_leaves_need_full_and_nothing_is_signalled_during_a_load() -> None:
    signals = {ChainEvent.SIGNAL_DELTA, ChainEvent.SIGNAL_FULL}
    assert (ChainState.NEED_FULL, ChainEvent.SIGNAL_DELTA) not in TRANSITIONS
    assert not {event for state, event in TRANSITIONS if state is ChainState.LOADING} & signals


def test_the_next_attempt_counts_from_the_last_also_where_earlier_ones_are_gone() -> None:
    """Retention may remove a failed delta and keep the full after it: its name stays taken."""
    failed_first = attempt(signalled=True, planned=full_of())
    second = manifest_of(
        plan_full(CONTENT, "", run_id="run", policy_version=5, attempts=failed_first)
    )
    attempts = [PublishAttempt(second, signalled=True)]
    failed = serving(None, stage="error", target_identity=second.identity)
    again = plan(read_chain(failed, None, attempts), attempts)
    assert (again.attempt, next_attempt([])) == (2, 0)
    assert again.identity != second.identity


# What was served before, and left


def asked_again(
    chain: Chain,
    attempts: list[PublishAttempt],
    *,
    served_before: tuple[str, ...],
    lost: tuple[str, ...] = (),
) -> SnapshotPlan:
    return plan_next(
        chain,
        attempts,
        CONTENT,
        run_id="run",
        policy_version=5,
        cadence=Cadence(),
        served_before=served_before,
        lost=lost,
        may_go_back=True,
    )


def test_a_stored_delta_is_signalled_again_only_where_it_was_served() -> None:
    attempts = [PublishAttempt(manifest_of(DELTA), signalled=True)]
    chain = read_chain(serving(HEAD.identity, HEAD.identity), HEAD, attempts)
    again = asked_again(chain, attempts, served_before=(DELTA.identity,))
    assert (again.identity, again.previous) == (DELTA.identity, HEAD.identity)
    doubted = asked_again(chain, attempts, served_before=())
    assert (doubted.kind, doubted.attempt) == (SnapshotKind.FULL, 1)


def test_a_way_back_is_a_delta_with_an_attempt_of_its_own() -> None:
    first = manifest_of(full_of(5).model_copy(update={"attempt": 1}))
    attempts = [PublishAttempt(first, signalled=True)]
    chain = read_chain(serving(HEAD.identity, HEAD.identity), HEAD, attempts)
    back = asked_again(chain, attempts, served_before=(first.identity,))
    assert (back.kind, back.previous, back.attempt) == ("delta", HEAD.identity, 2)
    killed = [*attempts, PublishAttempt(manifest_of(back), signalled=True)]
    chain = read_chain(serving(HEAD.identity, HEAD.identity), HEAD, killed)
    assert asked_again(chain, killed, served_before=(first.identity,)).kind is SnapshotKind.FULL


def test_an_identity_whose_record_is_lost_is_never_used_again() -> None:
    lost = (full_of(5).identity, DELTA.identity)
    plan = asked_again(CHAINED, [], served_before=(), lost=lost)
    assert plan.kind is SnapshotKind.FULL
    assert plan.identity not in lost
    assert "cannot be read" in plan.reason
