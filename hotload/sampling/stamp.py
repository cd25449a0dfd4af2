"""The stamp of samples: which weights were confirmed when they were asked for."""

from dataclasses import dataclass

from hotload.identity import line_of, read_identity
from hotload.publish.readiness import ServiceStatus


@dataclass(frozen=True, slots=True)
class Stamp:
    """What samples are stamped with, and the newest version of their run that every replica was
    seen to serve; superseded once the run was taken back to before what is sampled."""

    identity: str
    policy_version: int
    is_superseded: bool = False

    def after(self, status: ServiceStatus, run_id: str) -> "Stamp":
        """Return the stamp once a service was seen like this."""
        now, line = self, line_of(self.identity)
        for identity in status.served_everywhere:
            served = read_identity(identity)
            if served is None or served.run_id != run_id or served.line < line:
                continue
            if served.policy_version > now.policy_version:
                now = Stamp(identity, served.policy_version, now.is_superseded)
            elif served.line > line:
                now = Stamp(identity, now.policy_version, is_superseded=True)
        return now
