"""The HTTP side of the emulator: every path of the protocol and the emulator's own."""

__all__ = [
    "app",
    "coreweave_door",
    "deployed_models",
    "extensions",
    "gateway",
    "generation",
    "inference",
    "inference_request",
    "inference_response",
    "plain_door",
    "request_fields",
]
