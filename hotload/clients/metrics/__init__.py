"""Metrics sent to Prometheus and Weights & Biases."""
