"""Give up a refinement, matrix by matrix, that leaves more error on windows held out than the mask that it started from.

    ||(W - W') X||_F  <=  ||(W - M W) X||_F        on held-out X, with M the mask of the score

Swaps and refits minimise the error on the calibration tokens; on few tokens they fit these rather than the layer.
"""

import torch

from stages.pruning import distributed
from stages.pruning.entries import Pruned


def without_harm(weights: list[torch.Tensor], solved: list[Pruned], masks: list[torch.Tensor], held_out: torch.Tensor) -> list[Pruned]:
    """Replace each outcome that does harm by the mask that it started from, with the weights as they were.

    Args:
        weights: the dense matrices, [rows, columns], float32. masks: of the score, in their shapes, bool.
        held_out: inputs in this process's windows held out, [tokens, columns], float32; perhaps none.
    """
    judged = []
    for weight, pruned, mask in zip(weights, solved, masks, strict=True):
        refined = weight * pruned.mask if pruned.values is None else pruned.values
        errors = [(held_out @ (weight - values).T).double().square().sum() for values in (refined, weight * mask)]
        error, error_of_mask = distributed.all_reduce(torch.stack(errors).cpu()).tolist()
        harmful = error > error_of_mask
        values = None if pruned.values is None else weight * mask
        judged.append(Pruned(mask=mask, values=values, damping=pruned.damping, refined=False) if harmful else pruned)
    return judged
