"""What a trainer wrote: shards, index, spec and config as values, and the rules they keep."""

__all__ = [
    "anatomy",
    "checkpoint",
    "completeness",
    "index_and_spec",
    "meaning",
    "model_config",
    "names",
    "quantization",
    "relayout_plan",
    "rules",
    "safetensors",
    "side_files",
    "sub_configs",
    "tied_head",
]
