"""Record: the frozen value that is also parsed from outside JSON; a file with its digest."""

from __future__ import annotations

import json
import re
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hotload.errors import StoreError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/\\\x00-\x1f]+$")]


class Record(BaseModel):
    """A frozen value that is also parsed from outside JSON; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse_stored(cls, data: bytes, path: str) -> Self:
        """Parse the record in `data`, which was read at `path`.

        Raises:
            StoreError: it is no such record; names the first field that is wrong.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            found = error.errors(include_input=False, include_url=False)[0]
            where = [".".join(map(str, found["loc"]))] if found["loc"] else []
            noun = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
            raise StoreError(path, ": ".join([f"not a {noun}", *where, found["msg"]])) from None


def schema_number_of(data: bytes) -> int:
    """Read the schema number of a stored record that may be of a newer version; 0 if it has
    none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return 0
    number = document.get("schema_number") if isinstance(document, dict) else None
    return number if isinstance(number, int) else 0


class FileDigest(Record):
    """One file of a checkpoint or snapshot: name, size in bytes, SHA-256 of its bytes."""

    file: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256
