"""What services serve from one store, asked of each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from hotload.clients.access import Access
from hotload.clients.service.client import HotLoadClient
from hotload.concurrently import overlap
from hotload.errors import ServiceError, ServiceRefusedError, ServiceUnavailableError


def side_by_side(
    services: Mapping[str, HotLoadClient], *, is_made_here: bool = True
) -> dict[str, HotLoadClient]:
    """Return the services of a cycle, by the names of their blocks; of several, each names itself.

    Args:
        is_made_here: whether deltas are encoded on this machine, not on nodes or by ranks.

    Raises:
        ServiceRefusedError: two blocks are of one service, or take different deltas, or take such
            as are made here alone.
    """
    codecs = {service.access.api.codec for service in services.values()}
    if len(codecs) > 1:
        found = f"they take different deltas, {' and '.join(sorted(codecs))}"
        raise ServiceRefusedError("open", None, found, "Give each kind a cycle and a store")
    if not is_made_here and codecs != {"arc_v2"}:
        found = f"nodes and ranks make no deltas for the dialect {min(codecs)}"
        raise ServiceRefusedError("open", None, found, "Leave placement and ranks out")
    blocks: dict[str, str] = {}
    for block, service in services.items():
        name = service.access.service
        if (other := blocks.setdefault(name, block)) != block:
            found = f"the blocks {other!r} and {block!r} are both of {name}"
            advice = "Name each service once, in service or other_services"
            raise ServiceRefusedError("open", None, found, advice)
    return {
        block: replace(service, is_one_of_several=len(services) > 1)
        for block, service in services.items()
    }


def sampled_service(services: Collection[HotLoadClient], access: Access) -> str:
    """Name the service that requests for samples with this access go to; the only one is taken
    unseen.

    Raises:
        ServiceRefusedError: it is none of several.
    """

    def place(one: Access) -> tuple[str, str]:
        return one.service, one.origin("rollouts")

    for service in services:
        if not service.is_one_of_several or place(service.access) == place(access):
            return service.access.service
    known = ", ".join(service.access.service for service in services)
    found = f"{access.source} samples {access.service}, which is none of the services {known}"
    advice = "Give it the account, deployment and base_url of one of them"
    raise ServiceRefusedError("open", None, found, advice)


async def read_served(
    services: Sequence[HotLoadClient], store_url: str
) -> dict[str, tuple[str, ...]]:
    """Ask every service what it serves, loads, or failed on; each identity with their names.

    Raises:
        ServiceUnavailableError: one does not answer, or lists no replica.
        ServiceRefusedError: one refuses, or loads from another store than `store_url`.
        ProtocolError: an answer of another form.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for service, identities in zip(
        services, await overlap(_ask(one, store_url) for one in services), strict=True
    ):
        for identity in identities:
            found[identity].append(service.access.service)
    return {identity: tuple(names) for identity, names in found.items()}


async def _ask(service: HotLoadClient, store_url: str) -> frozenset[str]:
    name = service.access.service
    try:
        lines = service.preflight(await service.describe(), store_url)
        status = await service.observe()
    except ServiceError as error:
        operation = f"{error.operation} of {name}, so what it serves is unknown"
        raise type(error)(operation, error.status_code, error.detail, error.advice) from None
    for line in lines:
        if line.name == "bucket" and not line.ok:
            raise ServiceRefusedError(f"what {name} serves", None, f"{line.found}; {line.advice}")
    if not status.replicas:
        reason = "it lists no replica, so what they will load is unknown; ask again when it is up"
        raise ServiceUnavailableError(f"what {name} serves", None, reason)
    return status.mentioned
