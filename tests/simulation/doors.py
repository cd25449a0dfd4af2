"""Store and service as a process of the simulation reaches them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from hotload.clients.store import Store
from hotload.clients.store.buckets import MemoryBucket
from hotload.clients.store.stored_object import StoredObject
from hotload.directory.files import AnyFile, read_whole
from hotload.publish.fireworks_names import HINT_PATH, HOT_LOAD_PATH
from tests.simulation.loop import PROCESS, moment
from tests.simulation.network import SERVICE, STORE, WireFault

if TYPE_CHECKING:
    from tests.simulation.fleet import Fleet
    from tests.simulation.world import World


class SimulatedBucket:
    """Objects in memory behind a wire; every change is watched."""

    def __init__(self, world: World, root: str) -> None:
        self._world = world
        self.memory = MemoryBucket(root)
        self._written_at: dict[str, datetime] = {}

    async def put_file(self, local: AnyFile, path: str) -> None:
        await self.put_bytes(await asyncio.to_thread(read_whole, local), path)

    async def put_bytes(self, data: bytes, path: str) -> None:
        process = PROCESS.get()
        self._world.watch.claiming(process, path, data)

        async def effect(_: WireFault | None) -> None:
            await self._world.watch.storing(process, path, data)
            await self.memory.put_bytes(data, path)
            self._written_at[path] = moment()

        await self._call("put", path, effect)

    async def create_bytes(self, data: bytes, path: str) -> bool:
        return await self._call("create", path, lambda _: self.create_unseen(data, path))

    async def create_unseen(self, data: bytes, path: str) -> bool:
        """Create an object unless there is one, by nobody's call."""
        is_new = await self.memory.create_bytes(data, path)
        if is_new:
            self._written_at[path] = moment()
        return is_new

    async def read_bytes(self, path: str, limit_bytes: int) -> bytes:
        process = PROCESS.get()

        async def effect(_: WireFault | None) -> bytes:
            data = await self.memory.read_bytes(path, limit_bytes)
            self._world.watch.read(process, path, data)
            return data

        return await self._call("read", path, effect)

    async def get_file(self, path: str, local: Path) -> None:
        async def effect(fault: WireFault | None) -> bytes:
            data = await self.memory.read_bytes(path, 1 << 30)
            return data[: len(data) // 2] if fault and fault.how == "short" else data

        data = await self._call("get", path, effect)
        await asyncio.to_thread(local.write_bytes, data)

    async def size(self, path: str) -> int | None:
        return await self._call("size", path, lambda _: self.memory.size(path))

    async def names(self, prefix: str) -> list[str]:
        return await self._call("names", prefix, lambda _: self.memory.names(prefix))

    async def objects(self, prefix: str) -> list[StoredObject]:
        async def effect(_: WireFault | None) -> list[StoredObject]:
            listed = await self.memory.objects(prefix)
            return [replace(one, modified_at=self._written_at[one.path]) for one in listed]

        return await self._call("objects", prefix, effect)

    async def delete_file(self, path: str) -> None:
        process = PROCESS.get()

        async def effect(_: WireFault | None) -> None:
            self._world.watch.deleting(process, path)
            await self.memory.delete_file(path)

        await self._call("delete", path, effect)

    async def abort_orphaned_uploads(self, prefix: str) -> int:
        return await self._call("abort", prefix, lambda _: _none_left())

    async def _call(self, operation: str, path: str, effect: Callable[..., Any]) -> Any:
        return await self._world.network.call(STORE, operation, path, effect, ConnectionResetError)


async def _none_left() -> int:
    return 0


class SimulatedStore(Store):
    """A store over a bucket of the simulation."""

    @classmethod
    def over(cls, url: str, bucket: SimulatedBucket) -> SimulatedStore:
        store = cls(url)
        object.__setattr__(store, "_simulated", bucket)
        return store

    @property
    def _bucket(self) -> Any:
        return self._simulated  # type: ignore[attr-defined]


class InProcess(httpx.AsyncBaseTransport):
    """Requests to the application of one service, over a wire."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        process, body = PROCESS.get(), await request.aread()
        operation = operation_of(request.method, request.url.path)
        fleet, watch = self._fleet, self._fleet.world.watch
        if operation == "signal":
            watch.sending(process, fleet, json.loads(body))
            if fleet.on_signal is not None:
                fleet.on_signal(json.loads(body))

        async def effect(fault: WireFault | None) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
            status, headers, answer = await ask(fleet.app, request, body)
            if status == 200 and fault and fault.how == "lie":
                answer = _flattering(answer)
            return status, headers, answer

        def lost() -> Exception:
            return httpx.ReadError("the connection was reset")

        status, headers, answer = await fleet.world.network.call(
            SERVICE, operation, fleet.name, effect, lost
        )
        if operation == "status":
            watch.shown(process, fleet, status, answer)
        return httpx.Response(status, headers=headers, content=answer)


def operation_of(method: str, path: str) -> str:
    """Name what is asked for."""
    if path == HOT_LOAD_PATH:
        return "signal" if method == "POST" else "status"
    if path == HINT_PATH:
        return "hint"
    return "ledger" if path.endswith("/ledger") else "deployment"


async def ask(
    app: Any, request: httpx.Request, body: bytes
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Ask an ASGI application; the status, headers and the body of its answer."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope_of(request.method, request.url.path, request.headers.raw), receive, send)
    whole = b"".join(each.get("body", b"") for each in sent[1:])
    headers = list(sent[0]["headers"])
    declared = dict(headers).get(b"content-length")
    if declared is not None and int(declared) != len(whole):
        raise httpx.RemoteProtocolError("the connection was closed within the answer")
    return sent[0]["status"], headers, whole


def scope_of(method: str, path: str, headers: Any) -> dict[str, Any]:
    """Describe a request to an ASGI application."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in headers],
        "client": ("simulation", 1),
        "server": ("service", 80),
    }


def _flattering(answer: bytes) -> bytes:
    """Show the first replica that is on its way as if it had arrived."""
    try:
        shown = json.loads(answer)
        replicas = list(shown["replicas"])
    except (ValueError, LookupError, TypeError):
        return answer
    for replica in replicas:
        target = replica["loading_state"].get("target_snapshot_identity")
        if target and target != replica["current_snapshot_identity"]:
            replica |= {"readiness": True, "current_snapshot_identity": target}
            replica["loading_state"] = {"stage": "completed", "target_snapshot_identity": target}
            break
    return json.dumps(shown).encode()


def forget_objects(root: str) -> None:
    """Remove every object of a world from the memory that all worlds of a process share."""
    import fsspec

    store = fsspec.filesystem("memory").store
    for path in [path for path in store if path.startswith(f"/{root}/")]:
        del store[path]
