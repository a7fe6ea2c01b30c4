"""What to do to every block of a model: the method, the patterns of the masks, and how kept weights are trained."""

from dataclasses import dataclass, field

import torch

from stages.pruning.distillation import Distillation
from stages.pruning.method import Method
from stages.pruning.patterns import Pattern
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.section import Propagation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do to every block.

    patterns: matrix name -> the pattern of its mask.
    propagate: whose outputs statistics are collected on, see Propagation.
    error_tokens: about how many calibration tokens the relative error is measured on, evenly spread; for an expert the first
        eighth of that number that chose it.
    expert_tokens: an expert that fewer tokens chose is calibrated on a sample of all tokens.
    reconstruction: how the kept weights of each block are trained once it is pruned, or None.
    distillation: how the kept weights of the last blocks are trained together once all blocks are pruned, or None; those blocks
        are not reconstructed.
    permutation_rounds: how often a column is tried in other groups of N:M, see permutations; None: columns are not permuted.
    permutable: the blocks in which columns are permuted, see permutable_blocks; None: all.
    row_costs: matrix name -> cost of a squared error of each of its outputs, [rows], float32, above 0; a matrix without an entry has
        equal costs. Costs matter where the rows of a matrix compete for its kept weights.
    """

    method: Method
    patterns: dict[str, Pattern]
    propagate: Propagation
    error_tokens: int
    expert_tokens: int
    reconstruction: Reconstruction | None = None
    distillation: Distillation | None = None
    permutation_rounds: int | None = None
    permutable: frozenset[int] | None = None
    row_costs: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if Propagation(self.propagate) is Propagation.DENSE and self.trains:
            raise ValueError("found dense propagation with training, wanted pruned propagation: training needs the pruned hidden states")

    @property
    def trains(self) -> bool:
        """Whether kept weights are trained."""
        return self.reconstruction is not None or self.distillation is not None

    @property
    def streams(self) -> int:
        """How many streams of hidden states are kept: the pruned model's and, where weights are trained, the teacher's and the
        student's before a distillation."""
        return 1 + self.trains + (self.distillation is not None)

    @property
    def changes_weights(self) -> bool:
        """Whether kept weights change."""
        return self.method.changes_weights or self.trains

    def propagates_while_pruning(self, index: int) -> bool:
        """Whether the pass in which a block is pruned gives the next block's inputs, too.

        The outputs of a sequential pass are those of the pruned block, if neither training nor a permutation changes it afterwards.
        """
        if self.propagate == Propagation.SEQUENTIAL:
            return self.reconstruction_of(index) is None and self.permutation_rounds is None
        return self.propagate == Propagation.DENSE

    def reconstruction_of(self, index: int) -> Reconstruction | None:
        """How a block is trained alone."""
        return self.reconstruction if self.distillation is None or index < self.distillation.first else None
