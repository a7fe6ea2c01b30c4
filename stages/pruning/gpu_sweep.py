"""Whether there is a kernel for SparseGPT's sweep, and its start; see sweep_kernel, which needs the package triton."""

from importlib.util import find_spec

import torch

from stages.devices import current

OLDEST_GPU = (8, 0)  # compute capability for which triton compiles


def has_kernel(device: torch.device, block_size: int, group: int) -> bool:
    """Whether this GPU sweeps blocks of so many columns by a kernel.

    Args:
        group: M, where the sweep chooses N of every M columns; 0: the mask of a block is given.
    """
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return False
    from stages.pruning.sweep_kernel import LARGEST_GROUP, WIDEST, is_built

    return block_size <= WIDEST and group <= LARGEST_GROUP and is_built(device)


def sweep(weight: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, *, kept: int = 0, group: int = 0) -> torch.Tensor:
    """Sweep a block on its own GPU; see sweep_kernel.sweep."""
    from stages.pruning import sweep_kernel

    with current(weight.device):
        return sweep_kernel.sweep(weight, mask, factor, kept=kept, group=group)
