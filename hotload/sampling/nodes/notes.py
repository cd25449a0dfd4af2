"""What crosses between a cycle and the nodes that sample parts of its rollout: values alone.

A share goes as the parameter of a flow run. What comes of it are part files in the store; beside
them lie notes, each written again and again by the one it is of, and removed at the end:

_hotload/nodes/<talk>/cycle.json           what nodes hold to
_hotload/nodes/<talk>/nodes/<share>.json   how far a node is
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from hotload.clients.nodes import NODES
from hotload.clients.store.store import Store
from hotload.errors import StoreError
from hotload.options import WINDOW_LIMIT, Concurrency, NodeName
from hotload.records import Record, Sha256
from hotload.sampling.part_carrier import RolloutState
from hotload.sampling.stamp import Stamp
from hotload.spec import BlockName, CycleSpec

NOTE_LIMIT_BYTES = 1 << 20
SECONDS_BETWEEN_NOTES = 1.0

# In a range: sums of what anybody may have written stay numbers.
Slots = Annotated[float, Field(ge=-WINDOW_LIMIT, le=WINDOW_LIMIT)]


class SharedService(Record):
    """What a node samples from one service: parts, below its share of the window."""

    rollouts: BlockName
    identity: str
    parts: tuple[int, ...]
    concurrency: Concurrency


class SamplingShare(Record):
    """A node's share of the parts of a rollout, whose plan has this digest."""

    step: Literal["sample"] = "sample"
    spec: CycleSpec
    share: NodeName
    identity: str
    digest: Sha256
    services: tuple[SharedService, ...]
    talk: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Names the directory of the notes."""

    def spec_of(self, service: SharedService) -> CycleSpec:
        """Return the cycle with this node's share of a service's window."""
        sampling = self.spec.sampling.model_copy(update={"concurrency": service.concurrency})
        return self.spec.model_copy(update={"sampling": sampling})

    @property
    def nodes(self) -> tuple[str, ...]:
        """Who is asked to sample it, in turn: the node it was dealt to, then the others."""
        nodes = self.spec.sampling.nodes
        own = nodes.index(self.share)
        return nodes[own:] + nodes[:own]


class _Note(Record):
    """A record that is written again and again, with the next number each time."""

    number: int = Field(ge=0)

    @classmethod
    async def read(cls, store: Store, path: str) -> Self | None:
        """Read the note at `path`; None where there is none that can be read now."""
        try:
            data = await store.read_bytes(path, limit_bytes=NOTE_LIMIT_BYTES)
            return cls.parse_stored(data, path)
        except StoreError:
            return None

    async def write(self, store: Store, path: str) -> None:
        """Write the note, over the one before.

        Raises:
            StoreError: the store refuses.
        """
        await store.put_bytes(self.model_dump_json().encode(), path)


class NodeNote(_Note):
    """How far a node is, and how wide its windows are, by service."""

    state: RolloutState
    widths: dict[BlockName, Slots]


class Shift(Record):
    """By how many slots a node's windows change, by service, from its note of this number."""

    number: int
    slots: dict[BlockName, Slots]


class CycleNote(_Note):
    """What nodes hold to: the stamp of each service, and windows as wide as the others'."""

    stamps: dict[BlockName, Stamp]
    shifts: dict[NodeName, Shift] = Field({})


def cycle_path(talk: str) -> str:
    """Say where the cycle's note lies."""
    return f"{NODES}/{talk}/cycle.json"


def node_path(talk: str, share: str) -> str:
    """Say where the note lies of whoever samples a share."""
    return f"{NODES}/{talk}/nodes/{share}.json"
