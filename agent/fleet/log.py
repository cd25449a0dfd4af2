"""The log of a fleet in the store: numbered events, each created once, read by doors and agents."""

from __future__ import annotations

from collections.abc import Collection

from agent.fleet.state import FleetEvent, FleetState
from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.store import Store
from hotload.errors import StoreError

FLEETS = "_hotload/fleets"
EVENT_LIMIT_BYTES = 1 << 20


class FleetLog:
    """The events of one service. Those that were read are kept: an event never changes."""

    def __init__(self, store: Store, account_id: str, deployment_id: str) -> None:
        directory = f"{FLEETS}/{account_id}/{deployment_id}"
        self._log = LeaseLog(store, directory, 1, 10, EVENT_LIMIT_BYTES)
        self._place = f"{store.url.rstrip('/')}/{directory}"
        self._store = store
        self._events: dict[int, FleetEvent] = {}

    async def read(self) -> FleetState:
        """Read what came since, and say where all of it leads.

        Raises:
            StoreError: the store does not answer, or an entry is no event.
        """
        numbers, known = await self._log.numbers(), self._events
        events = {number: known[number] for number in numbers if number in known}
        for number in numbers:
            if number not in events:
                path = self._log.path(number)
                data = await self._store.read_bytes(path, limit_bytes=EVENT_LIMIT_BYTES)
                try:
                    events[number] = FleetEvent.parse_stored(data, path)
                except StoreError as error:
                    reason = f"{error.reason}; remove it where it is none of ours"
                    raise StoreError(path, reason) from None
        self._events = events
        return FleetState.of((events[number] for number in numbers), max(numbers, default=0))

    def remark(self, state: FleetState) -> str:
        """Say where nothing was ever signalled, as it is when a bucket or a name is misspelt."""
        if state.number:
            return ""
        return f"no log at {self._place}: nothing was signalled there yet, base weights are served"

    async def append(self, event: FleetEvent, *, after: FleetState) -> bool:
        """Add the event that follows a state; False where another came first.

        Raises:
            StoreError: as `Store.create_bytes`, and where no number follows.
        """
        path = self._log.path(after.number + 1)
        return await self._store.create_bytes(event.model_dump_json().encode(), path)

    async def prune(self, served: Collection[str | None]) -> None:
        """Remove what lies before the chains to all that is served, and to what all are to serve.

        Raises:
            StoreError: as `Store.delete_file`.
        """
        state = await self.read()
        chains = [state.chain_for(""), *map(state.chain_to, served)]
        needed = {load.identity for chain in chains for load in chain}
        numbers = [number for number, one in self._events.items() if one.identity in needed]
        if numbers:
            await self._log.remove_before(min(numbers))
