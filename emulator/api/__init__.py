"""The HTTP side of the emulator: every path of the protocol and the emulator's own."""

__all__ = [
    "app",
    "extensions",
    "gateway",
    "generation",
    "hot_load",
    "inference",
    "inference_request",
    "inference_response",
]
