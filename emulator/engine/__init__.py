"""Engines: weights from a directory, and tokens from them."""

__all__ = [
    "decoding",
    "engine",
    "feed_forward",
    "llama",
    "numpy_engine",
    "quantized",
    "stub",
    "tokens",
    "torch_engine",
    "weights",
]
