"""The order of the steps and nothing else; read flows/cycle.py first."""

__all__ = ["cycle", "cycle_file", "publish", "sampling", "serve"]
