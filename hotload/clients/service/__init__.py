"""The control side of a hot-load service: signal, hint, observe, describe, reset."""

from hotload.clients.service.calls import RESOURCE_ID, check_origin
from hotload.clients.service.client import HotLoadClient

__all__ = ["RESOURCE_ID", "HotLoadClient", "check_origin"]
