"""What an agent says of itself, and a door believes or not."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictBool

from agent.fleet.state import NAME
from agent.loading.loader import replica_entry
from hotload.records import Record, Sha256

REPORT_LIMIT_BYTES = 64 << 10
REPORT_PATH, LOOK_PATH = "/agent", "/agent/look"


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
    error: str = Field("", max_length=2000)
    remark: str = Field("", max_length=2000)

    def replica(self) -> dict[str, Any]:
        """Show it as an entry of `replicas` (protocol §5)."""
        return replica_entry(self.readiness, self.current, self.stage, self.target)
