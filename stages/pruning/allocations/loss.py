"""Loss: choose the zeros of each matrix that minimise the expected rise of the loss, from the gradients of a few windows; our own.

    min_s sum_l E_l(s_l)  with  sum_l size_l s_l = budget

E_l: the expected rise of the loss for each sparsity of matrix l, see sensitivity.sensitivities.
"""

from dataclasses import dataclass, replace

import torch

from stages.pruning import distributed
from stages.pruning.allocation import BoundedSection, counts_by_curves
from stages.pruning.entries import Allocation, Budgeted, DenseModel, Evidence
from stages.pruning.patterns import Unstructured
from stages.pruning.sensitivity import sensitivities
from stages.schema import checked, number
from stages.streaming.architecture import Matrix

GRID = [step / 50 for step in range(50)] + [0.99, 1.0]  # sparsities at which the rise of the loss is estimated


def _are_weights(weights: list[float]) -> bool:
    return 0 < len(set(weights)) == len(weights) and all(0 <= weight <= 1 for weight in weights)


@dataclass(kw_only=True, slots=True)
class LossSection(BoundedSection):
    """windows: number of calibration windows, from the first on, whose gradients are taken.

    gradient_weights: how much a token's own squared gradient decides the weight of its activations, each 0 to 1, 0: all tokens weigh the
        same; the one whose allocation leaves the least loss on the windows held out is taken.
    row_strength: exponent of the cost of a row's errors, with which the rows of a matrix compete if method.comparison_group is
        matrix; 0: all rows cost the same. row_floor: lower bound of what losing a whole row costs, as a fraction of the mean of its matrix.
    """

    windows: int = number(minimum=1)
    gradient_weights: list[float] = checked(_are_weights, "at least one number in [0, 1], each once")
    row_strength: float = number(minimum=0, maximum=1)
    row_floor: float = number(above=0, maximum=1)


def evidence(dense: DenseModel, section: LossSection) -> Evidence:
    """Of every gradient weight C: NAME.curve.C: [grid], float64, the expected rise of the loss; NAME.rows.C: [rows], float32, the Fisher
    estimate of each output.

    An expert to which no token was routed has an empty curve and rows of equal cost.

    Raises:
        ArchitectureError: blocks hand on more than hidden states; before a weight is read.
    """
    dense.decoder.require_gradients_by_hidden_states(f"allocation={section.name}")
    windows = dense.first(max(section.windows, distributed.world_size()))  # at least one for each process
    weights = section.gradient_weights
    stream = dense.stream(windows)
    measured = sensitivities(stream, GRID, dense.comparison_group, gradient_weights=weights, fisher_floor=section.row_floor)
    matrices = [matrix for block in dense.decoder.matrices for matrix in block]
    tensors: Evidence = {}
    for weight, matrix in ((weight, matrix) for weight in weights for matrix in matrices):
        sensitivity = measured[weight].get(matrix.name)
        curve, rows = (sensitivity.curve, sensitivity.fisher) if sensitivity else ([], torch.ones(matrix.shape[0]))
        tensors[_key(matrix, "curve", weight)], tensors[_key(matrix, "rows", weight)] = torch.tensor(curve, dtype=torch.float64), rows
    return tensors


def versions(section: LossSection) -> list[LossSection]:
    """One for each gradient weight."""
    return [replace(section, gradient_weights=[weight]) for weight in section.gradient_weights]


def counts(evidence: Evidence, matrices: list[list[Matrix]], pattern: Unstructured, section: LossSection) -> list[int]:
    """See entries.Budgeted; the section has one gradient weight."""
    (weight,) = section.gradient_weights
    flat = [matrix for block in matrices for matrix in block]
    curves = [evidence[_key(matrix, "curve", weight)].tolist() for matrix in flat]
    return counts_by_curves(curves, GRID, [matrix.size for matrix in flat], pattern.sparsity, section)


def row_costs(evidence: Evidence, matrices: list[list[Matrix]], pattern: Unstructured, section: LossSection) -> Evidence:
    """See entries.Budgeted; the section has one gradient weight."""
    (weight,) = section.gradient_weights
    if not section.row_strength or pattern.comparison_group != "matrix":
        return {}
    flat = [matrix for block in matrices for matrix in block]
    return {matrix.name: evidence[_key(matrix, "rows", weight)] ** section.row_strength for matrix in flat}


def _key(matrix: Matrix, kind: str, weight: float) -> str:
    """The name of a tensor of the evidence."""
    return f"{matrix.name}.{kind}.{weight!r}"


LOSS = Allocation(
    name="loss",
    budgeted=Budgeted(evidence=evidence, counts=counts, row_costs=row_costs, versions=versions, takes_gradients=True),
    parameters=LossSection,
    summary="zeros lie where the gradients of a few calibration windows expect the least rise of the loss",
)
