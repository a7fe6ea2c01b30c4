"""Which weights may be kept together. A mask is bool and True means kept; counts are exact, whatever the ties.

A pattern chooses among the scores of a range of columns. A sweep that changes weights on the way asks for one range after
another; the counts of the ranges add up to that of the whole.
"""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import gcd
from typing import Literal, Protocol, get_args

import torch

from stages.groups import FEW_COLUMNS, keep_highest_of_few
from stages.schema import Citation, Entry, Table, checked, number, require

ComparisonGroup = Literal["row", "matrix"]  # whose weights compete: those of an output row, or of the whole matrix

WEIGHTS_AT_ONCE = 2**22  # a selection takes some times their memory
SAMPLED_SCORES = 2**17
FEW_ROWS = 64  # a GPU selects in each row by few of its threads, and sorts by all


def pruned_count(total: int, sparsity: float | Fraction) -> int:
    """How many of `total` weights are pruned: floor(total * sparsity), the sparsity read as the decimal that the user wrote.

    (In binary 100 * 0.29 is just below 29.)
    """
    return int(total * Fraction(str(sparsity)))


def keep_highest(scores: torch.Tensor, pruned: int) -> torch.Tensor:
    """Prune the lowest scores of each row; of equals the leftmost first, as a stable sort would.

    Args:
        scores: [rows, columns], finite.
        pruned: how many of each row, 0 to columns.

    Returns:
        [rows, columns], bool, exactly `pruned` False in each row.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    if not all(torch.isfinite(chunk).all() for chunk in scores.split(max(1, WEIGHTS_AT_ONCE // scores.shape[1]))):
        raise ValueError("found a score that is NaN or infinite, wanted finite scores")
    mask = torch.ones_like(scores, dtype=torch.bool)
    rows = max(1, WEIGHTS_AT_ONCE // scores.shape[1])
    for chunk, mask_chunk in zip(scores.split(rows), mask.split(rows), strict=True):
        if pruned:
            mask_chunk.copy_(_keep_highest(chunk, pruned))
    return mask


def _keep_highest(scores: torch.Tensor, pruned: int) -> torch.Tensor:
    highest_pruned = _nth_lowest(scores, pruned)
    below = scores < highest_pruned
    equal = scores == highest_pruned
    ties_to_prune = pruned - below.sum(dim=1, keepdim=True)
    if torch.equal(equal.sum(dim=1, keepdim=True), ties_to_prune):
        return ~(below | equal)
    return ~(below | (equal & (equal.cumsum(dim=1) <= ties_to_prune)))


def _nth_lowest(scores: torch.Tensor, nth: int) -> torch.Tensor:
    """[rows, 1]: the nth lowest of each row, by partition; nth counts from 1."""
    if scores.device.type == "cpu":
        values = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).clone().numpy()  # numpy has no bfloat16
        values.partition(nth - 1, axis=1)
        return torch.from_numpy(values[:, nth - 1 : nth].copy()).to(scores.dtype)
    if len(scores) < FEW_ROWS:
        return scores.sort(dim=1).values[:, nth - 1 : nth]
    return scores.topk(nth, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Any weights, a fraction of each row or of the whole matrix.

    sparsity: fraction of zeros in [0, 1]; a Fraction is what an allocation gave the matrix, and is met to the weight.
    comparison_group: see ComparisonGroup.
    """

    sparsity: float | Fraction
    comparison_group: ComparisonGroup

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"found sparsity {self.sparsity}, wanted a fraction of zeros in [0, 1]")
        if self.comparison_group not in get_args(ComparisonGroup):
            raise ValueError(f"found comparison_group {self.comparison_group!r}, wanted one of {', '.join(get_args(ComparisonGroup))}")

    @property
    def grouped(self) -> bool:
        return False

    @property
    def group(self) -> None:
        """There are no groups of columns."""

    def check(self, columns: int, rows: int = 1) -> None:
        """Refuse a matrix in which nothing would be pruned, though a sparsity is asked for.

        Raises:
            ValueError: naming the sparsity and the least one.
        """
        competing = columns if self.comparison_group == "row" else rows * columns
        if self.sparsity > 0 and pruned_count(competing, self.sparsity) == 0:
            raise ValueError(
                f"found sparsity {float(self.sparsity):g}, wanted 0 or at least 1/{competing}: no weight of {competing} would be pruned"
            )

    def decision_columns(self, block_size: int) -> int:
        """How many columns a sweep with blocks of `block_size` decides on together."""
        return block_size

    def mask(self, scores: torch.Tensor, first_column: int = 0) -> torch.Tensor:
        """Choose among the columns from `first_column` on.

        Args:
            scores: [rows, columns of the range], finite.

        Returns:
            The same shape, bool.
        """
        rows, columns = scores.shape
        end = first_column + columns
        if self.comparison_group == "matrix":
            count = pruned_count(rows * end, self.sparsity) - pruned_count(rows * first_column, self.sparsity)
            return keep_highest(scores.reshape(1, -1), count).view(rows, columns)
        if isinstance(self.sparsity, Fraction):
            return _keep_highest_evenly(scores, pruned_count(rows * end, self.sparsity) - pruned_count(rows * first_column, self.sparsity))
        return keep_highest(scores, pruned_count(end, self.sparsity) - pruned_count(first_column, self.sparsity))

    def approximate_mask(self, scores: torch.Tensor) -> torch.Tensor:
        """About the mask of a whole matrix, [rows, columns], at less cost: one threshold, from a sample of the scores."""
        if self.comparison_group == "row":
            return self.mask(scores)
        stride = max(1, scores.numel() // SAMPLED_SCORES)
        while gcd(stride, scores.shape[1]) > 1:  # else it meets the same few columns in every row
            stride += 1
        sample = scores.flatten()[::stride]
        return scores > _nth_lowest(sample[None], max(1, pruned_count(len(sample), self.sparsity)))


def _keep_highest_evenly(scores: torch.Tensor, pruned: int) -> torch.Tensor:
    """Prune `pruned` of all: equally many in every row, and one more in the rows with the lowest next score."""
    per_row, remainder = divmod(pruned, len(scores))
    mask = keep_highest(scores, per_row)
    if remainder:
        rows = ~keep_highest(_nth_lowest(scores, per_row + 1).view(1, -1), remainder)[0]
        mask[rows] = keep_highest(scores[rows], per_row + 1)
    return mask


@dataclass(frozen=True, kw_only=True)
class Nm:
    """N weights kept of every M consecutive input columns.

    kept: N. group: M.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.group or self.group < 1:
            raise ValueError(f"found {self.kept} kept of every {self.group}, wanted N of every M with 0 <= N <= M and M at least 1")

    @property
    def grouped(self) -> bool:
        return True

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    def check(self, columns: int, rows: int = 1) -> None:
        """Refuse a matrix that groups do not fill.

        Raises:
            ValueError: naming both numbers.
        """
        if columns % self.group:
            raise ValueError(f"found {columns} columns, wanted a multiple of pattern.group = {self.group}")

    def decision_columns(self, block_size: int) -> int:
        return self.group

    def mask(self, scores: torch.Tensor, first_column: int = 0) -> torch.Tensor:
        """Choose in every group of `scores`, [rows, columns], columns a multiple of the group."""
        self.check(scores.shape[1])
        groups = scores.reshape(-1, self.group)
        keep = keep_highest_of_few if self.group <= FEW_COLUMNS else keep_highest
        return keep(groups, self.group - self.kept).view(scores.shape)

    def approximate_mask(self, scores: torch.Tensor) -> torch.Tensor:
        return self.mask(scores)


Pattern = Unstructured | Nm


# The sections of the configuration.


class PatternSection(Protocol):
    """What every section `pattern` provides.

    label: in plots and on the card. sparsity: fraction of zeros. exact_sparsity: the same, of the numbers that the user wrote.
    grouped: whether weights compete within groups of columns, and every matrix gets the same sparsity.
    permutation_rounds: how often an input channel is tried in other groups, or None: channels stay in place.
    """

    name: str

    @property
    def label(self) -> str: ...

    @property
    def sparsity(self) -> float: ...

    @property
    def exact_sparsity(self) -> Fraction: ...

    @property
    def grouped(self) -> bool: ...

    @property
    def permutation_rounds(self) -> int | None: ...

    def pattern(self, comparison_group: ComparisonGroup) -> Pattern:
        """The pattern of a matrix."""

    def group_size(self, comparison_group: ComparisonGroup, rows: int, columns: int) -> int:
        """How many weights of a matrix of so many rows and columns compete; row by row, each group follows the last."""

    def competing(self, comparison_group: ComparisonGroup) -> str:
        """Which weights compete, in words."""

    def amount(self, comparison_group: ComparisonGroup) -> str:
        """The pattern with its numbers, for a release's name."""


@dataclass(kw_only=True, slots=True)
class UnstructuredSection:
    """sparsity: fraction of zeros."""

    name: str
    sparsity: float = checked(lambda sparsity: 0 <= sparsity < 1, "a fraction of zeros in [0, 1)")

    @property
    def label(self) -> str:
        return self.name

    @property
    def exact_sparsity(self) -> Fraction:
        return Fraction(str(self.sparsity))

    @property
    def grouped(self) -> bool:
        return False

    @property
    def permutation_rounds(self) -> None:
        """Input channels stay in place."""

    def pattern(self, comparison_group: ComparisonGroup) -> Unstructured:
        return Unstructured(sparsity=self.sparsity, comparison_group=comparison_group)

    def group_size(self, comparison_group: ComparisonGroup, rows: int, columns: int) -> int:
        return columns if comparison_group == "row" else rows * columns

    def competing(self, comparison_group: ComparisonGroup) -> str:
        return "the weights of an output row" if comparison_group == "row" else "all weights of a matrix"

    def amount(self, comparison_group: ComparisonGroup) -> str:
        percent = format((100 * Decimal(str(self.sparsity))).normalize(), "f")
        return f"sparse{percent}" + ("" if comparison_group == "row" else "-per-matrix")


@dataclass(kw_only=True, slots=True)
class NmSection:
    """kept: N, weights kept of each group. group: M, consecutive input columns.

    permutation_rounds: how often an input channel is tried in other groups; null: channels stay in place.
    """

    name: str
    kept: int
    group: int = number(minimum=2, unit="columns")
    permutation_rounds: int | None = number(minimum=0)

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    @property
    def exact_sparsity(self) -> Fraction:
        return 1 - Fraction(self.kept, self.group)

    @property
    def label(self) -> str:
        return f"{self.kept}:{self.group}" + ("" if self.permutation_rounds is None else " permuted")

    @property
    def grouped(self) -> bool:
        return True

    def pattern(self, comparison_group: ComparisonGroup) -> Nm:
        """Groups compete, for every comparison group."""
        return Nm(kept=self.kept, group=self.group)

    def group_size(self, comparison_group: ComparisonGroup, rows: int, columns: int) -> int:
        return self.group

    def competing(self, comparison_group: ComparisonGroup) -> str:
        return f"every {self.group} consecutive input columns of a row, of which {self.kept} are kept"

    def amount(self, comparison_group: ComparisonGroup) -> str:
        return self.label.replace(":", "of")

    def check(self, key: str) -> None:
        require(0 < self.kept < self.group, f"{key}.kept", self.kept, f"N in 1..{self.group - 1}, below {key}.group")


PATTERNS = Table(
    [
        Entry(
            name="unstructured",
            parameters=UnstructuredSection,
            summary="any weights, a fraction of each row or matrix",
        ),
        Entry(
            name="nm",
            parameters=NmSection,
            summary="N weights kept of every M consecutive input columns",
            citation=Citation(text="Mishra et al. 2021", url="https://arxiv.org/abs/2104.08378"),
        ),
    ]
)
