"""What a trainer wrote: shards, index, spec and config as values, and the rules they keep."""

__all__ = [
    "anatomy",
    "checkpoint",
    "index_and_spec",
    "model_config",
    "names",
    "relayout_plan",
    "rules",
    "safetensors",
]
