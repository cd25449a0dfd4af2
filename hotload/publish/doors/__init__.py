"""How each kind of door spells what every hot-load service understands."""

__all__ = ["api_dialect", "coreweave"]
