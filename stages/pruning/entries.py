"""What scores, updates, allocations and reconstructions are: the entries of their tables.

A score says what a weight is worth. An update takes the score, the pattern of each matrix and the statistic of the input that the
matrices share, and gives masks, and new values where it changes the kept weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from stages.pruning.patterns import ComparisonGroup, Pattern
from stages.pruning.statistics import Statistic
from stages.schema import Entry

if TYPE_CHECKING:
    from stages.pruning.distillation import Distillation
    from stages.pruning.method import Method
    from stages.pruning.patterns import Unstructured
    from stages.pruning.reconstruction import Reconstruction
    from stages.streaming.architecture import Matrix
    from stages.streaming.decoder import Decoder
    from stages.streaming.stream import Stream


@dataclass(kw_only=True, slots=True)
class NoParameters:
    """The section of a choice that has none."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The outcome of one matrix.

    mask: [rows, columns], bool, True = kept.
    values: [rows, columns], float32, or None where kept weights did not change.
    damping: with which the Gram matrix was factored or solved, see method.Damping; None if neither.
    refined: whether it is what the update gave; False: the mask of the score, since the update did harm; None: not judged; see guard.
    """

    mask: torch.Tensor
    values: torch.Tensor | None = None
    damping: float | None = None
    refined: bool | None = None


ScoreFunction: TypeAlias = Callable[[torch.Tensor, Any, "Method"], torch.Tensor]
UpdateFunction: TypeAlias = Callable[[list[torch.Tensor], Any, list[Pattern], "Method"], list[Pruned]]


@dataclass(frozen=True, kw_only=True)
class Score(Entry):
    """What a weight is worth.

    of: from a matrix, [rows, columns], float32, the statistic of its input, and the method, whose `score` section holds the
        parameters, to scores of the same shape, finite and 0 or more, 0 for a weight of 0. With an allocation that gives rows a cost,
        the rows of the matrix are multiplied by its root. Raises ArithmeticError where the statistic has NaN or does not factor.
    statistic: what it needs to know of the input, at least.
    scales: for scores that are |W| times a number of each input, computed as one product in float32: from the matrix and the statistic to
        these numbers, [columns], float32; a mask by such scores is stored by them (checkpoint.scored_mask). None for all others.
    needs_matrix_comparison: whether it keeps the order of its base score within a row, so that it changes a mask only with
        method.comparison_group = matrix.
    """

    of: ScoreFunction
    statistic: type[Statistic]
    scales: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    needs_matrix_comparison: bool = False


def _nothing(*_: Any) -> None:
    """No condition."""


@dataclass(frozen=True, kw_only=True)
class Update(Entry):
    """What is done about the error of pruning: a change of the mask, or of the kept weights.

    prune: from the matrices that read one input, each [rows, columns], float32, not changed; the statistic of that input; a pattern
        for each; and the method, whose `update` section holds the parameters. Raises ArithmeticError where the statistic has NaN or
        does not factor, ValueError where a score is not finite.
    statistic: what it needs to know of the input, at least.
    changes_weights: whether kept weights get new values, by its section.
    refines: whether it improves on the mask of the score, and is given up for a matrix where it does harm, see guard.
    scores: the names of the scores that it can work from; None for all.
    check: what it asks of the method's and the pattern's sections together; raises ConfigError.
    """

    prune: UpdateFunction
    statistic: type[Statistic]
    changes_weights: Callable[[Any], bool]
    refines: bool = False
    scores: tuple[str, ...] | None = None
    check: Callable[[Any, Any], None] = _nothing


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """What an allocation measures on, before any block is pruned.

    windows: [windows, tokens], int64, the calibration windows. stream: makes a stream of some of them, before the first block.
    sources: number of windows of each source, in order; none: all are of one.
    """

    decoder: "Decoder"
    windows: torch.Tensor
    stream: Callable[[torch.Tensor], "Stream"]
    comparison_group: ComparisonGroup
    sources: tuple[int, ...] = ()

    def first(self, number: int) -> torch.Tensor:
        """At least so many windows, if there are as many: the first of every source, in proportion to its windows."""
        if len(self.sources) < 2:
            return self.windows[:number]
        parts = self.windows.split(self.sources)
        return torch.cat([part[: -(-number * len(part) // len(self.windows))] for part in parts])


Evidence: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """How to meet a budget of zeros with a sparsity of its own for every matrix.

    evidence: what is measured on the dense model, by its section; the journal keeps it.
    counts: from the evidence, the matrices of every block, the pattern that all together must meet, and the section, to the zeros of
        each matrix, in order, which add up to the budget. Raises ValueError where the evidence is not finite.
    row_costs: likewise, to what a squared error of each output of a matrix costs, [rows], float32, above 0, by the matrix's name;
        matrices that are not named have rows of equal cost.
    versions: from the section, to those with which `counts` and `row_costs` are tried, by default it alone; what leaves the least loss on
        the windows held out is taken.
    holds_scores: whether the scores of a whole block are in memory at once. takes_gradients: whether the loss is differentiated.
    """

    evidence: Callable[[DenseModel, Any], Evidence]
    counts: Callable[[Evidence, list[list["Matrix"]], "Unstructured", Any], list[int]]
    row_costs: Callable[[Evidence, list[list["Matrix"]], "Unstructured", Any], Evidence] = lambda *_: {}
    versions: Callable[[Any], list[Any]] = lambda section: [section]
    holds_scores: bool = False
    takes_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class Allocation(Entry):
    """How sparse each matrix is. budgeted: None where every matrix is as sparse as the pattern says."""

    budgeted: Budgeted | None


@dataclass(frozen=True, kw_only=True)
class Training(Entry):
    """How kept weights are trained on the calibration windows after their blocks are pruned.

    each_block: by its section, the training of every block on its own; None where there is none.
    last_blocks: by its section and the number of blocks, the training of the last blocks together; None where there is none.
    label: what tells models so trained from others in a plot, or "".
    """

    each_block: Callable[[Any], "Reconstruction | None"] | None = None
    last_blocks: Callable[[Any, int], "Distillation"] | None = None
    label: str = ""

    @property
    def trains(self) -> bool:
        """Whether kept weights are trained."""
        return self.each_block is not None or self.last_blocks is not None
