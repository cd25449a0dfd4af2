"""Answers to "does this connection work, and what is missing?", one line per question."""

from __future__ import annotations

from hotload.check_line import CheckLine
from hotload.publish.fireworks_names import HOSTED_BUCKET_TYPE
from hotload.publish.readiness import ServiceDescription, ServiceStatus

ENDING_STATES = ("DELETING", "DELETED", "FAILED")


def service_lines(
    description: ServiceDescription,
    *,
    bucket_url: str | None,
    base_model: str | None,
    transition_type: str | None,
) -> list[CheckLine]:
    """Check every row of protocol §8 but the first, whether the service exists at all.

    Args:
        bucket_url: the store's url, without a trailing slash; None is not compared.
        base_model: resource name of the model the caller expects; None takes any.
        transition_type: ASYNC or SYNC as the caller expects it; None takes either.
    """
    enabled = description.hot_load_enabled
    lines = [
        CheckLine(
            "hot load",
            enabled,
            "switched on" if enabled else "switched off",
            "Have the vendor enable hot-loading from your own bucket; no call can",
        )
    ]
    if bucket_url is not None:
        theirs = description.bucket_url
        lines.append(
            CheckLine(
                "bucket",
                theirs is not None and _with_scheme(theirs) == _with_scheme(bucket_url),
                f"the service reads {theirs or 'no bucket'}, the store writes {bucket_url}",
                "Set the store's url to the service's hotLoadBucketUrl",
            )
        )
    hosted = description.bucket_type == HOSTED_BUCKET_TYPE
    lines.append(
        CheckLine(
            "bucket type",
            not hosted,
            description.bucket_type or "not said",
            "A vendor-hosted bucket cannot be written from here; use a service with your own",
        )
    )
    lines.append(
        CheckLine(
            "transition",
            transition_type in (None, description.transition_type),
            description.transition_type,
            f"Expected {transition_type}; the service's own is used",
            stops=False,
        )
    )
    lines.append(
        CheckLine(
            "base model",
            base_model in (None, description.base_model),
            description.base_model or "not said",
            f"Expected {base_model}",
            stops=False,
        )
    )
    minimum = description.min_replica_count
    lines.append(
        CheckLine(
            "minimum replicas",
            bool(minimum),
            "not said, so none" if minimum is None else str(minimum),
            "Set minReplicaCount above 0: at zero, requests fail and loaded snapshots are lost",
            stops=False,
        )
    )
    state = description.state or "not said"
    creating = state == "CREATING"
    lines.append(
        CheckLine(
            "state",
            not creating and state not in ENDING_STATES,
            state,
            "It may answer already" if creating else "Choose a service that is up",
            stops=not creating,
        )
    )
    return lines


def is_answer_due(status: ServiceStatus, *, is_adapter: bool, is_asked_as_status_was: bool) -> bool:
    """Tell whether samples asked for now have to find the model: a 404 is then a wrong address or
    name (protocol §8), and else may pass, or be in order.

    A replica that is ready and loads nothing serves. Before the first snapshot nobody says what its
    base weights answer to, and an adapter has no name before it is loaded: there a 404 is wrong
    only where it comes from another address, or for other names, than the status.

    Args:
        is_adapter: what is published is one.
        is_asked_as_status_was: by the same names, at the same address.
    """
    serving = [one for one in status.replicas if one.readiness and not one.loading_identity]
    if is_adapter:
        return any(state == "loaded" for one in serving for _, state in one.adapters)
    return any(one.current_identity or not is_asked_as_status_was for one in serving)


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"file://{url}"
