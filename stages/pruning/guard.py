"""Give up a refinement, matrix by matrix, that leaves more error on windows held out than the mask that it started from.

    ||(W - W') X||_F  <=  ||(W - M W) X||_F        on held-out X, with M the mask of the score

Swaps and refits minimise the error on the calibration tokens; on few tokens they fit these rather than the layer.
"""

from dataclasses import replace

import torch

from stages.pruning import distributed
from stages.pruning.entries import Pruned


def without_harm(
    weights: list[torch.Tensor],
    solved: list[Pruned],
    masks: list[torch.Tensor],
    row_scales: list[torch.Tensor | None],
    held_out: torch.Tensor,
) -> list[Pruned]:
    """Replace each outcome that does harm by the mask that it started from, with the weights as they were.

    Args:
        weights: the dense matrices, [rows, columns], float32. masks: of the score, in their shapes, bool.
        row_scales: by which the errors of the rows of a matrix are multiplied, [rows, 1], or None.
        held_out: inputs in this process's windows held out, [tokens, columns], float32; perhaps none.
    """
    judged = []
    for weight, pruned, mask, scale in zip(weights, solved, masks, row_scales, strict=True):
        refined = weight * pruned.mask if pruned.values is None else pruned.values
        lost = [weight - values if scale is None else (weight - values) * scale for values in (refined, weight * mask)]
        errors = [(held_out @ matrix.T).double().square().sum().cpu() for matrix in lost]
        error, error_of_mask, tokens = distributed.all_reduce(torch.stack([*errors, torch.tensor(float(len(held_out)))])).tolist()
        if not tokens:  # an expert that none of them chose
            judged.append(pruned)
        elif error > error_of_mask:
            values = None if pruned.values is None else weight * mask
            judged.append(Pruned(mask=mask, values=values, damping=pruned.damping, refined=False))
        else:
            judged.append(replace(pruned, refined=True))
    return judged
