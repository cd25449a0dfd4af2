"""The hot-load service: signal, status, description."""
