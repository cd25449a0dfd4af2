"""What an earlier run of a cycle left in the store, held against what the replicas serve now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hotload.publish.publication import Publication, ServicePublication
from hotload.publish.readiness import ServiceStatus, Standing, standing_of
from hotload.report.cycle_report import CycleReport


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A cycle's report, if it has ended before, and what it published; nothing the first time.

    A cycle is done when every service serves its snapshot, or a later version of the same run: what
    lies in the store does not say so, only the replicas do.
    """

    standings: Mapping[str, Standing] = field(default_factory=dict)
    """By the name of the service."""
    report: CycleReport | None = None
    publication: Publication | None = None
    """Left by a cycle that samples while the next may publish, and by a rollback to it."""
    statuses: Mapping[str, ServiceStatus] = field(default_factory=dict)
    """What the replicas of each service say."""
    differs: bool = False
    """Whether problems, sampling or reward are declared otherwise than they were."""

    @classmethod
    def of(
        cls,
        statuses: Mapping[str, ServiceStatus],
        report: CycleReport | None,
        publication: Publication | None,
        *,
        run_id: str,
        differs: bool,
    ) -> EarlierRun:
        """Hold what lies in the store against what the replicas of each service say."""
        records = [one for one in (report, publication) if one is not None]
        published = [one.snapshot for one in records]
        published += [one.snapshot for each in records for one in each.services if one.snapshot]

        def standing(status: ServiceStatus) -> Standing:
            found = {
                standing_of(one.identity, status, run_id=run_id, policy_version=one.policy_version)
                for one in published
            }
            return next((one for one in Standing if one in found), Standing.NOT_SERVED)

        standings = {name: standing(status) for name, status in statuses.items()}
        return cls(standings, report, publication, statuses, differs)

    def answers(self, again: str | None) -> bool:
        """Tell whether its report is the answer, and nothing is left to do."""
        return self.report is not None and self.stands and again is None

    @property
    def served(self) -> str:
        """Say in words what is served, of several services by each."""
        said = {name: status.describe() for name, status in self.statuses.items()}
        if len(said) == 1:
            return "".join(said.values())
        return "; ".join(f"{name} {text}" for name, text in said.items())

    @property
    def standing(self) -> Standing:
        """How it stands with the services: that of the one where it stands worst."""
        worst = [one for one in Standing if one in self.standings.values()]
        return worst[-1] if worst else Standing.NOT_SERVED

    def at(self, service: str) -> tuple[ServicePublication, ...]:
        """List what this version came to at one service, as the records say."""
        records = [one for one in (self.report, self.publication) if one is not None]
        return tuple(one for each in records for one in each.services if one.service == service)

    def served_before(self, service: str) -> frozenset[str]:
        """List the identities of this version that every replica of a service has served once."""
        return frozenset(one.snapshot.identity for one in self.at(service) if one.snapshot)

    def found(self, service: str) -> ServicePublication | None:
        """Find what a service has already and still serves, so that nothing is left to do."""
        if self.standings.get(service, Standing.NOT_SERVED) is Standing.NOT_SERVED:
            return None
        served = self.statuses[service].served_everywhere
        # A record of an earlier version of hotload, which knew one service, does not name it.
        if not self.at(service) and self.publication and len(self.statuses) == 1:
            published = self.publication
            return ServicePublication(
                service=service, snapshot=published.snapshot, fallback=published.fallback
            )
        found = [(one, one.snapshot.identity) for one in self.at(service) if one.snapshot]
        ours = [one for one, identity in found if identity in served]
        return next(iter([*ours, *(one for one, _ in found)]), None)

    @property
    def stands(self) -> bool:
        """Whether that is still so, or the run has gone on since."""
        return self.standing is not Standing.NOT_SERVED
