"""Metrics sent to Prometheus and Weights & Biases."""

__all__ = ["send", "wandb_worker"]
