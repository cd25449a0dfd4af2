"""Inference servers that load weights from a directory: one module a kind, behind one protocol."""

__all__ = ["calls", "declared", "reloading", "sglang", "transformers_serve", "vllm"]
