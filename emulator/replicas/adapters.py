"""The LoRA adapters of one replica, and what answers a request (protocol §10)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emulator.replicas.prompt_cache import PromptCache

LOADING, LOADED, FAILED = "loading", "loaded", "failed"


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """Weights that answer, under which identity, and the prompts computed with them."""

    identity: str | None
    weights: Any
    prompt_cache: PromptCache


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter: its directory, and the weights below it with it added."""

    directory: Path
    served: ServedWeights


@dataclass(slots=True)
class AdapterSlots:
    """Adapters side by side, `count` at most: for one more the oldest makes room.

    `statuses` are what the service shows: loading, loaded, failed.
    """

    count: int
    statuses: dict[str, str] = field(default_factory=dict)
    _loaded: dict[str, Adapter] = field(default_factory=dict)

    @property
    def newest(self) -> ServedWeights | None:
        """What answers a request that names no adapter."""
        return next(reversed(self._loaded.values())).served if self._loaded else None

    @property
    def directories(self) -> list[Path]:
        """Where the loaded ones lie."""
        return [adapter.directory for adapter in self._loaded.values()]

    def find(self, identity: str) -> ServedWeights | None:
        """Find a loaded adapter."""
        found = self._loaded.get(identity)
        return found.served if found else None

    def put(self, identity: str, directory: Path, weights: Any) -> None:
        """Serve an adapter; what had failed before is forgotten."""
        self._loaded.pop(identity, None)
        self._loaded[identity] = Adapter(directory, ServedWeights(identity, weights, PromptCache()))
        while len(self._loaded) > self.count:
            del self._loaded[next(iter(self._loaded))]
        self.statuses = dict.fromkeys(self._loaded, LOADED)

    def remove(self, identity: str) -> bool:
        """Free the slot of an adapter; whether it had one."""
        self.statuses.pop(identity, None)
        return self._loaded.pop(identity, None) is not None

    def clear(self) -> None:
        """Free every slot."""
        self.statuses, self._loaded = {}, {}
