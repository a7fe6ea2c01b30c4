"""A method: a score, who competes by it, and an update.

mask, values = update(score(W, X), pattern)
"""

from dataclasses import dataclass
from typing import Any, cast, get_args

import torch

from stages.pruning.entries import Pruned
from stages.pruning.patterns import ComparisonGroup, Pattern
from stages.pruning.scores import SCORES
from stages.pruning.statistics import Gram, Moments, NoStatistic, SquaredNorm, Statistic
from stages.pruning.updates import UPDATES
from stages.pruning.updates.none import NONE
from stages.schema import choice, number, one_of, require

STATISTICS: tuple[type[Statistic], ...] = (NoStatistic, SquaredNorm, Moments, Gram)  # each of the last two has squared norms, too


@dataclass(kw_only=True, slots=True)
class Damping:
    """Of the Gram matrix, where it is factored or solved.

    share: fraction of the diagonal that is added to the diagonal: of its mean (obs, sparsegpt), or of each entry (admm, least squares,
        the refit after swaps).
    limit: upper bound of the share, which is raised tenfold a step while the matrix does not factor.
    shrinkage: whether the share is that of each entry for all, and grows where tokens are few for the inputs; see shrinkage.
    """

    share: float = number(above=0)
    limit: float = number(above=0)
    shrinkage: bool

    def check(self, key: str) -> None:
        require(self.limit >= self.share, f"{key}.limit", self.limit, f"at least {key}.share = {self.share:g}")


@dataclass(kw_only=True, slots=True)
class Method:
    """The section `method`, and what it does.

    name: of the preset. score, update: sections of their own, shaped by SCORES and UPDATES.
    comparison_group: whose weights compete: those of an output row, or of the whole matrix. With N:M those of a group do, always.
    """

    name: str
    score: Any = choice(SCORES)
    comparison_group: str = one_of(*get_args(ComparisonGroup))
    update: Any = choice(UPDATES)
    damping: Damping

    @property
    def compared_within(self) -> ComparisonGroup:
        """comparison_group, as a type that OmegaConf does not know."""
        return cast(ComparisonGroup, self.comparison_group)

    @property
    def changes_weights(self) -> bool:
        """Whether kept weights get new values."""
        return UPDATES.of(self.update).changes_weights(self.update)

    @property
    def refines(self) -> bool:
        """Whether the update improves on the mask of the score, and is judged by windows held out."""
        return UPDATES.of(self.update).refines

    @property
    def shrinks(self) -> bool:
        """Whether something is damped, and how much is chosen by windows held out."""
        solves = UPDATES.of(self.update).statistic is Gram and self.changes_weights
        return self.damping.shrinkage and (solves or SCORES.of(self.score).statistic is Gram)

    @property
    def statistic(self) -> type[Statistic]:
        """What is collected of every layer's input: the least that both score and update can work from."""
        return max(SCORES.of(self.score).statistic, UPDATES.of(self.update).statistic, key=STATISTICS.index)

    def require_outcome(self, weight: torch.Tensor, pruned: Pruned) -> None:
        """Raise ValueError where an update gives something else than a mask and, if it says so, values."""
        mask, values, name = pruned.mask, pruned.values, self.update.name
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted = f"torch.bool of {list(weight.shape)}"
            raise ValueError(f"update {name}: found a mask of {mask.dtype} and shape {list(mask.shape)}, wanted {wanted}")
        if (values is not None) != self.changes_weights or (values is not None and values.shape != weight.shape):
            actual = "no values" if values is None else f"values of shape {list(values.shape)}"
            wanted = f"values of {list(weight.shape)}" if self.changes_weights else "none: it says that it changes no weights"
            raise ValueError(f"update {name}: found {actual}, wanted {wanted}")

    def label(self, *, grouped: bool) -> str:
        """The preset's name and, where the name does not say it all, score, update and comparison group.

        Args:
            grouped: whether the pattern is N:M, so that groups compete.
        """
        score, update = self.score.name, self.update.name
        if self.name == score and update == NONE.name and (grouped or self.comparison_group == "row"):
            return self.name
        made_of = score if update == NONE.name else f"{score} + {update}"
        return f"{self.name} ({made_of})" if grouped else f"{self.name} ({made_of}, per {self.comparison_group})"

    def check_with(self, pattern: Any) -> None:
        """Check score, update and pattern together.

        Args:
            pattern: the section, or the pattern itself.

        Raises:
            ConfigError: naming the key, the value found and the value wanted.
        """
        score, update = SCORES.of(self.score), UPDATES.of(self.update)
        key, condition = "method.score.name", f"with method.update.name = {update.name}"
        if update.scores is not None:
            require(
                score.name in update.scores, key, score.name, f"{' or '.join(update.scores)} {condition}, which works from no other score"
            )
        if {score.statistic, update.statistic} == {Gram, Moments}:
            wanted = f"a score that needs no {score.statistic.__name__} statistic {condition}, which has {update.statistic.__name__} alone"
            require(False, key, score.name, wanted)
        if score.needs_matrix_comparison and not pattern.grouped:
            group, wanted = self.comparison_group, f"matrix with method.score.name = {score.name}"
            require(group == "matrix", "method.comparison_group", group, wanted)
        update.check(self, pattern)


def prune_matrices(weights: list[torch.Tensor], statistic: Any, method: Method, patterns: list[Pattern]) -> list[Pruned]:
    """Prune the matrices that read the same inputs: what is factored of their statistic is factored once.

    Args:
        weights: each [rows, columns], float32; not changed.
        statistic: of the inputs, of the type `method.statistic`, after its `finish`.
        patterns: one for each matrix.

    Raises:
        ArithmeticError: the statistic has NaN or infinity, or does not factor.
        ValueError: a score is NaN or infinite, or the update gives something else than it says.
    """
    outcomes = UPDATES.of(method.update).prune(weights, statistic, patterns, method)
    for weight, pruned in zip(weights, outcomes, strict=True):
        method.require_outcome(weight, pruned)
    return outcomes


def prune_matrix(weight: torch.Tensor, inputs: torch.Tensor, method: Method, pattern: Pattern) -> Pruned:
    """Prune one matrix, as the block loop does: see prune_matrices.

    Args:
        weight: [rows, columns], any float dtype; not changed.
        inputs: [tokens, columns], any float dtype, on the same device: what the layer reads.
        method: see config.compose.method for those of conf/method.
        pattern: Unstructured(sparsity=0.5, comparison_group="row"), Nm(kept=2, group=4).

    Returns:
        The mask and, where the method changes kept weights, their values.

    Raises:
        ConfigError: score, update and pattern do not fit each other.
        ArithmeticError: the inputs have NaN or infinity, or their Gram matrix does not factor.
        ValueError: there are no inputs, the shapes do not fit each other or the pattern, or a score is NaN or infinite.
    """
    if weight.dim() != 2 or inputs.dim() != 2 or weight.shape[1] != inputs.shape[1]:
        raise ValueError(f"found weight {list(weight.shape)} and inputs {list(inputs.shape)}, wanted [rows, columns] and [tokens, columns]")
    if not len(inputs):
        raise ValueError("found inputs of 0 tokens, wanted at least one")
    pattern.check(weight.shape[1], weight.shape[0])
    method.check_with(pattern)
    statistic = method.statistic(weight.shape[1], weight.device)
    statistic.add(inputs[None])
    statistic.finish()
    return prune_matrices([weight.float()], statistic, method, [pattern])[0]
