"""One of the services of a world: the emulator's application, its replicas, and what is ordered of
it alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx

from hotload.clients.access import Access
from hotload.clients.service import HotLoadClient
from hotload.clients.store.publisher_leases import lease_log
from hotload.publish.fireworks_names import HOT_LOAD_PATH
from hotload.publish.lease import TTL_SECONDS, Lease
from hotload.publish.lease import Process as HostProcess
from tests.simulation.doors import InProcess, ask
from tests.simulation.loop import moment

if TYPE_CHECKING:
    from tests.simulation.world import World

BLOCKS = {"default": "rollouts", "other": "evaluation"}
"""The services there may be, by the names of their blocks."""


class Fleet:
    """A service with its replicas; `name` is that of its deployment."""

    def __init__(self, world: World, block: str) -> None:
        self.world, self.block, self.name = world, block, BLOCKS[block]
        self.access = Access("local", "policy", self.name, "http://service", "key")
        self.app: Any = None
        self.on_signal: Callable[[dict[str, Any]], None] | None = None
        self._orders: list[tuple[str, Any, int]] = []

    @property
    def service(self) -> Any:
        """The emulator's own service."""
        return self.app.state.service

    @property
    def replicas(self) -> list[Any]:
        return [] if self.app is None else list(self.service.replicas)

    def client(self) -> HotLoadClient:
        return HotLoadClient(self.access, transport=InProcess(self))

    def order(self, kind: str, **order: Any) -> None:
        """Order a fault of the emulator's own."""
        self._orders.append((kind, self.service.faults.add(order), 0))

    def count_orders(self, *, take_back: bool) -> None:
        """Count what the emulator's faults have done since."""
        left = []
        for kind, fault, counted in self._orders:
            for _ in range(fault.struck - counted):
                self.world.strike(kind)
            left.append((kind, fault, fault.struck))
        self._orders = left
        if take_back:
            self._orders = []
            self.service.faults.clear()
            self.on_signal = None

    async def hold_lease(self, seconds: float) -> bool:
        """Let a publisher that nobody knows of hold this service."""
        world, directory = self.world, lease_log(self.world.store(), self.access.service)
        tokens = [
            number
            for path in world.stored()
            if path.startswith(f"{directory.directory}/")
            and (number := directory.number_of(path.rpartition("/")[2]))
        ]
        lease = Lease(
            token=max(tokens, default=0) + 1,
            nonce="0" * 32,
            service=self.access.service,
            holder="somebody",
            process=HostProcess(host="elsewhere", pid=0, started="0"),
            renewed_at=moment(),
            expires_at=moment(TTL_SECONDS),
        ).renewed(moment(), seconds)
        path = directory.path(lease.token)
        return await world.bucket.create_unseen(lease.render(), path)

    async def signal_somebody_elses(self) -> bool:
        """Signal a full snapshot of another run, without asking for a lease."""
        world = self.world
        identity = f"other-{len(world.watch.foreign):06d}-00000000"
        files = {
            path.name: path.read_bytes()
            for path in sorted(world.trainer.base.iterdir())
            if not path.name.startswith("tokenizer")
        }
        for name, data in files.items():
            await world.bucket.create_unseen(data, f"{identity}/{name}")
        world.watch.foreign[identity] = {
            name: hashlib.sha256(data).hexdigest() for name, data in files.items()
        }
        request = httpx.Request(
            "POST",
            f"http://service{HOT_LOAD_PATH}",
            headers={**self.access.names(), "Authorization": "Bearer key"},
            json={"identity": identity},
        )
        status, _, _ = await ask(self.app, request, request.content)
        return status == 200
