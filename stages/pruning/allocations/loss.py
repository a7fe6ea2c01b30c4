"""Loss: choose the zeros of each matrix that minimise the expected rise of the loss, from the gradients of a few windows; our own.

    min_s sum_l E_l(s_l)  with  sum_l size_l s_l = budget

E_l: the expected rise of the loss for each sparsity of matrix l, see sensitivity.sensitivities.
"""

from dataclasses import dataclass

import torch

from stages.pruning import distributed
from stages.pruning.allocation import BoundedSection, counts_by_curves
from stages.pruning.entries import Allocation, Budgeted, DenseModel, Evidence
from stages.pruning.patterns import Unstructured
from stages.pruning.sensitivity import sensitivities
from stages.schema import number
from stages.streaming.architecture import Matrix

GRID = [step / 50 for step in range(50)] + [0.99, 1.0]  # sparsities at which the rise of the loss is estimated


@dataclass(kw_only=True, slots=True)
class LossSection(BoundedSection):
    """windows: number of calibration windows, from the first on, whose gradients are taken.

    row_strength: exponent of the cost of a row's errors, with which the rows of a matrix compete if method.comparison_group is
        matrix; 0: all rows cost the same. row_floor: lower bound of what losing a whole row costs, as a fraction of the mean of its matrix.
    """

    windows: int = number(minimum=1)
    row_strength: float = number(minimum=0, maximum=1)
    row_floor: float = number(above=0, maximum=1)


def evidence(dense: DenseModel, section: LossSection) -> Evidence:
    """NAME.curve: [grid], float64, the expected rise of the loss; NAME.rows: [rows], float32, the Fisher estimate of each output.

    An expert to which no token was routed has an empty curve and rows of equal cost.
    """
    windows = dense.windows[: max(section.windows, distributed.world_size())]  # at least one for each process
    measured = sensitivities(dense.stream(windows), GRID, dense.comparison_group, section.row_floor)
    tensors: Evidence = {}
    for matrix in (matrix for block in dense.decoder.matrices for matrix in block):
        sensitivity = measured.get(matrix.name)
        curve, rows = (sensitivity.curve, sensitivity.fisher) if sensitivity else ([], torch.ones(matrix.shape[0]))
        tensors[f"{matrix.name}.curve"], tensors[f"{matrix.name}.rows"] = torch.tensor(curve, dtype=torch.float64), rows
    return tensors


def counts(evidence: Evidence, matrices: list[list[Matrix]], pattern: Unstructured, section: LossSection) -> list[int]:
    """See entries.Budgeted."""
    flat = [matrix for block in matrices for matrix in block]
    curves = [evidence[f"{matrix.name}.curve"].tolist() for matrix in flat]
    return counts_by_curves(curves, GRID, [matrix.size for matrix in flat], pattern.sparsity, section)


def row_costs(evidence: Evidence, matrices: list[list[Matrix]], pattern: Unstructured, section: LossSection) -> Evidence:
    """See entries.Budgeted."""
    if not section.row_strength or pattern.comparison_group != "matrix":
        return {}
    return {matrix.name: evidence[f"{matrix.name}.rows"] ** section.row_strength for block in matrices for matrix in block}


LOSS = Allocation(
    name="loss",
    budgeted=Budgeted(evidence=evidence, counts=counts, row_costs=row_costs, takes_gradients=True),
    parameters=LossSection,
    summary="zeros lie where the gradients of a few calibration windows expect the least rise of the loss",
)
