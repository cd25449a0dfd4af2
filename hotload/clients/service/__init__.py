"""The hot-load service: signal, hint, observe, describe, reset."""

from hotload.clients.service.client import HotLoadClient
from hotload.clients.service.doors import open_service

__all__ = ["HotLoadClient", "open_service"]
