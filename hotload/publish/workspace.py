"""Workspace: where a publisher keeps its own files on this machine.

<work_dir>/<account>/<deployment>/baseline/<identity>/   full bytes of the served snapshot
<work_dir>/<account>/<deployment>/deltas/<identity>/     encoded shards on their way
<work_dir>/<account>/<deployment>/results/               results of finished steps
<work_dir>/<account>/<deployment>/digests.json           digests of the baselines' files
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths for one service below a cycle's `work_dir`; two services never share a file."""

    work_dir: Path
    account_id: str
    deployment_id: str

    @property
    def root(self) -> Path:
        """Parent of everything that is kept for the service."""
        return self.work_dir / self.account_id / self.deployment_id

    @property
    def baselines(self) -> Path:
        """Parent of the baselines, one directory per identity, complete whenever visible."""
        return self.root / "baseline"

    def baseline(self, identity: str) -> Path:
        """Directory with the full bytes of one snapshot."""
        return self.baselines / identity

    @property
    def deltas(self) -> Path:
        """Parent of the encoded deltas, one directory per identity."""
        return self.root / "deltas"

    def delta(self, identity: str) -> Path:
        """Directory with the encoded shards of one snapshot."""
        return self.deltas / identity

    @property
    def digests(self) -> Path:
        """Digests of the baselines' files, for as long as those stay as they are."""
        return self.root / "digests.json"

    @property
    def results(self) -> Path:
        """Cached task results; each names files that are checked before it is believed."""
        return self.root / "results"
