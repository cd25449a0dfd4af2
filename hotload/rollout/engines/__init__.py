"""Kinds of inference server: the request each is sent, and how its answers are read."""

__all__ = ["fireworks", "kind", "known", "llama_cpp", "openai", "sglang", "tgi", "vllm"]
