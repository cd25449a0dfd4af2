"""Rollout parts as Parquet bytes: rows of `table.Rollouts`, checked when written and when read."""

from __future__ import annotations

import io

import polars as pl
from pandera.errors import SchemaErrors

from hotload.dataset.table import check_rollouts
from hotload.errors import StoreError

# It grows with every change of a column's name, type or meaning.
ROWS_SCHEMA_NUMBER = 3
SCHEMA_KEY = "hotload.schema"
DIGEST_KEY = "hotload.digest"
NOTES_KEY = "hotload.notes"


def render_rollouts(frame: pl.DataFrame, *, digest: str, notes: str = "") -> bytes:
    """Write the frame as one Parquet file with the number of its schema; `parse_rollouts` reads it
    back.

    Args:
        digest: of what was asked for; `parse_rollouts` returns it.
        notes: text that travels with the rows; `notes_of` returns it.

    Raises:
        SchemaErrors: the frame breaks `Rollouts`.
    """
    buffer = io.BytesIO()
    facts = {SCHEMA_KEY: str(ROWS_SCHEMA_NUMBER), DIGEST_KEY: digest, NOTES_KEY: notes}
    check_rollouts(frame).write_parquet(buffer, metadata=facts)
    return buffer.getvalue()


def parse_rollouts(data: bytes, *, path: str) -> tuple[pl.DataFrame, str]:
    """Read the rows of a Parquet part that was read at `path`, checked, and the digest it carries.

    Raises:
        StoreError: not Parquet, of another schema number, or rows that break `Rollouts`.
    """
    try:
        facts = pl.read_parquet_metadata(io.BytesIO(data))
        number = facts.get(SCHEMA_KEY)
        if number != str(ROWS_SCHEMA_NUMBER):
            reason = f"schema {number!r}" if number else "no schema number"
            raise StoreError(path, f"rows with {reason}, expected {ROWS_SCHEMA_NUMBER}")
        frame = check_rollouts(pl.read_parquet(io.BytesIO(data)))
    except pl.exceptions.PolarsError as error:
        raise StoreError(path, f"not a Parquet file: {str(error)[:200]}") from None
    except SchemaErrors as error:
        raise StoreError(path, f"rows that break their schema: {_breaches(error)}") from None
    return frame, facts.get(DIGEST_KEY, "")


def notes_of(data: bytes) -> str:
    """Read the notes of a part that `parse_rollouts` has accepted; empty without any."""
    return pl.read_parquet_metadata(io.BytesIO(data)).get(NOTES_KEY, "")


def _breaches(error: SchemaErrors) -> str:
    breaches = [str(breach) for breach in error.failure_cases["check"].unique(maintain_order=True)]
    return "; ".join(breaches)[:400]
