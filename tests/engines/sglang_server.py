"""SGLang's HTTP application, imported where there is no GPU and no torchvision.

It imports torchvision for what it does with images, of which nothing runs here; torchvision and a
torch for CPUs are not to be had from one index everywhere.
"""

import sys
import types
from typing import Any

import transformers  # noqa: F401 - looks for torchvision when it is imported, and does without


class _NoTorchvision(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NoTorchvision(f"{self.__name__}.{name}")


for _name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules.setdefault(_name, _NoTorchvision(_name))

from sglang.srt.entrypoints import http_server  # noqa: E402
from sglang.srt.managers import io_struct  # noqa: E402

__all__ = ["http_server", "io_struct"]
