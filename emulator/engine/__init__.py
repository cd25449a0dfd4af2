"""Engines: weights from a directory, and tokens from them."""
