"""Layouts of sparse matrices that exist as kernels for GPUs, in which a release is put after it was loaded."""
