"""Tensors on disk, what each is in the model, and the sparse delta."""
