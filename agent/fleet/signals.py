"""The body of a signal, read strictly (protocol §4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from agent.failures import RefusedError, refused_field
from hotload.errors import InvalidIdentityError
from hotload.identity import check_identity
from hotload.publish.fireworks_names import FORMATS

FIELDS = ("identity", "incremental_snapshot_metadata", "reset_prompt_cache", "validation")
METADATA_FIELDS = ("previous_snapshot_identity", "compression_format", "checksum_format")
POLICIES = ("all", "none", "new_session")


@dataclass(frozen=True, slots=True)
class Signal:
    """An accepted signal body. `previous` is None unless it had delta metadata."""

    identity: str
    previous: str | None
    reset_prompt_cache: str
    extra_fields_ignore: tuple[str, ...]

    @classmethod
    def parse(cls, body: Mapping[str, Any], *, knows_prompt_cache: bool) -> Self:
        """Parse the signal in `body`.

        Raises:
            RefusedError: 400, naming the field.
        """
        known = FIELDS if knows_prompt_cache else [f for f in FIELDS if f != "reset_prompt_cache"]
        refuse_extra(body, known)
        identity = _identity(body.get("identity"), "identity")
        previous = None
        if "incremental_snapshot_metadata" in body:
            previous = _previous(body["incremental_snapshot_metadata"])
        validation = body.get("validation", {})
        if not isinstance(validation, dict):
            raise RefusedError(400, "validation: Input should be an object")
        refuse_extra(validation, ("extra_fields_ignore",), "validation.")
        ignored = validation.get("extra_fields_ignore", [])
        if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
            reason = "validation.extra_fields_ignore: Input should be a list of strings"
            raise RefusedError(400, reason)
        policy = body.get("reset_prompt_cache", "all")
        if isinstance(policy, bool):
            policy = "all" if policy else "none"  # the SDK sends a boolean
        if policy not in POLICIES:
            reason = f"reset_prompt_cache: Input should be one of {', '.join(POLICIES)}"
            raise RefusedError(400, reason)
        return cls(identity, previous, policy, tuple(ignored))


def refuse_extra(body: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Refuse the first field outside `known`."""
    extra = [name for name in body if name not in known]
    if extra:
        raise refused_field(prefix + extra[0])


def _previous(metadata: object) -> str:
    if not isinstance(metadata, dict):
        raise RefusedError(400, "incremental_snapshot_metadata: Input should be an object")
    refuse_extra(metadata, METADATA_FIELDS, "incremental_snapshot_metadata.")
    for name, expected in FORMATS.items():
        # Older docs omitted the checksum's name.
        if metadata.get(name, expected if name == "checksum_format" else None) != expected:
            reason = f"incremental_snapshot_metadata.{name}: Input should be {expected!r}"
            raise RefusedError(400, reason)
    field = "previous_snapshot_identity"
    return _identity(metadata.get(field), f"incremental_snapshot_metadata.{field}")


def _identity(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RefusedError(400, f"{name}: Input should be a string")
    try:
        return check_identity(value)
    except InvalidIdentityError as error:
        raise RefusedError(400, f"{name}: {error}") from None
