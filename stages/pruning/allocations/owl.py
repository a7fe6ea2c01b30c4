"""OWL: blocks with many outliers among their Wanda scores are pruned less.

    s_l = s + mean(d) - d_l,  d_l = 2 lambda (D_l - min D) / (max D - min D)        # Yin et al. 2024, arXiv:2310.05175

D_l: the fraction of outliers in block l, see allocation.outlier_share.
"""

from dataclasses import dataclass

import torch

from stages.pruning.allocation import BoundedSection, counts_by_block, owl
from stages.pruning.entries import Allocation, Budgeted, DenseModel, Evidence
from stages.pruning.patterns import Unstructured
from stages.pruning.sensitivity import outlier_shares
from stages.schema import Citation, number
from stages.streaming.architecture import Matrix


@dataclass(kw_only=True, slots=True)
class OwlSection(BoundedSection):
    """multiple: a score above this multiple of the mean is an outlier. strength: half the spread of the blocks' sparsities."""

    multiple: float = number(above=0)
    strength: float = number(minimum=0, below=1)


def evidence(dense: DenseModel, section: OwlSection) -> Evidence:
    """blocks: [blocks], float64, the fraction of outliers in each block."""
    return {"blocks": torch.tensor(outlier_shares(dense.stream(dense.windows), section.multiple), dtype=torch.float64)}


def counts(evidence: Evidence, matrices: list[list[Matrix]], pattern: Unstructured, section: OwlSection) -> list[int]:
    """See entries.Budgeted."""
    block_sparsities = owl(evidence["blocks"].tolist(), sparsity=float(pattern.sparsity), strength=section.strength)
    return counts_by_block(block_sparsities, [[matrix.size for matrix in block] for block in matrices], pattern.sparsity, section)


OWL = Allocation(
    name="owl",
    budgeted=Budgeted(evidence=evidence, counts=counts, holds_scores=True),
    parameters=OwlSection,
    summary="blocks with many outliers among their scores are pruned less",
    citation=Citation(text="Yin et al. 2024", url="https://arxiv.org/abs/2310.05175"),
)
