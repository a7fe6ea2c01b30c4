"""Masks and values: the methods, and the block loop that applies them."""
