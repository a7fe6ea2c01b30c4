"""Tensors on disk, the parameters that they fill, and the sparse delta."""
