"""What an agent says of itself, and a door believes or not."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool

from agent.fleet.state import NAME, REASON_CHARS
from agent.loading.loader import replica_entry
from hotload.clients.access import check_origin
from hotload.records import Record, Sha256

REPORT_LIMIT_BYTES = 64 << 10
REPORT_PATH, LOOK_PATH = "/agent", "/agent/look"
Address = Annotated[
    str, Field(max_length=2000), AfterValidator(lambda url: check_origin(url) if url else "")
]


class AgentReport(Record):
    """Name, stage and identity of one agent; `content_sha256` names the bytes that it serves from,
    as `hotload.publish.snapshot` names a checkpoint's content, once it has digested them. `remark`
    is what a person should know beside `error`."""

    name: str = Field(pattern=NAME)
    engine: str
    readiness: StrictBool
    current: str | None = None
    stage: str = "pending"
    target: str | None = None
    content_sha256: Sha256 | None = None
    error: str = Field("", max_length=REASON_CHARS)
    serves: Address = ""
    """Where clients ask its engine."""
    remark: str = Field("", max_length=REASON_CHARS)

    def replica(self, *, is_final: bool = False) -> dict[str, Any]:
        """Show it as an entry of `replicas` (protocol §5)."""
        return replica_entry(
            self.readiness,
            self.current,
            self.stage,
            self.target,
            error=self.error,
            is_final=is_final,
        )
