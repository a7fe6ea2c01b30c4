"""AlphaPruning: blocks whose weights have heavy-tailed spectra are pruned less.

    s_l = s r_l / mean(r),  r_l = 1 - e + 2 e (a_l - min a) / (max a - min a)       # Lu et al. 2024, arXiv:2410.10912

a_l: the mean Hill exponent of the block's matrices, see allocation.hill_exponent.
"""

from dataclasses import dataclass

import torch

from stages.pruning.allocation import BoundedSection, alphapruning, counts_by_block
from stages.pruning.entries import Allocation, Budgeted, DenseModel, Evidence
from stages.pruning.patterns import Unstructured
from stages.pruning.sensitivity import spectral_exponents
from stages.schema import Citation, number
from stages.streaming.architecture import Matrix


@dataclass(kw_only=True, slots=True)
class AlphaPruningSection(BoundedSection):
    """strength: half the spread of the blocks' sparsities, relative to the mean."""

    strength: float = number(minimum=0, below=1)


def evidence(dense: DenseModel, section: AlphaPruningSection) -> Evidence:
    """blocks: [blocks], float64, the mean Hill exponent of each block."""
    return {"blocks": torch.tensor(spectral_exponents(dense.decoder), dtype=torch.float64)}


def counts(evidence: Evidence, matrices: list[list[Matrix]], pattern: Unstructured, section: AlphaPruningSection) -> list[int]:
    """See entries.Budgeted."""
    block_sparsities = alphapruning(evidence["blocks"].tolist(), sparsity=float(pattern.sparsity), strength=section.strength)
    return counts_by_block(block_sparsities, [[matrix.size for matrix in block] for block in matrices], pattern.sparsity, section)


ALPHAPRUNING = Allocation(
    name="alphapruning",
    budgeted=Budgeted(evidence=evidence, counts=counts),
    parameters=AlphaPruningSection,
    summary="blocks with heavy-tailed spectra are pruned less",
    citation=Citation(text="Lu et al. 2024", url="https://arxiv.org/abs/2410.10912"),
)
