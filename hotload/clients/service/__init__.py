"""The hot-load service: signal, hint, observe, describe, reset."""

from hotload.clients.service.client import HotLoadClient

__all__ = ["HotLoadClient"]
