"""Statistics of a layer's inputs X, [columns, tokens], collected window by window in float32.

    NoStatistic    nothing
    SquaredNorm    ||X_j||_2²                          # Wanda: Sun et al. 2024, arXiv:2306.11695
    Moments        mean and variance of X_j            # DSnoT: Zhang et al. 2024, arXiv:2310.08915
    Gram           H = X Xᵀ                            # SparseGPT: Frantar & Alistarh 2023, arXiv:2301.00774

Matrices that read the same input have one statistic in common. Its scale does not matter: scores are compared within a matrix.
"""

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch

Result = TypeVar("Result")
AllReduce = Callable[[torch.Tensor], torch.Tensor]  # a tensor, changed in place to its sum over all processes

DAMPING_STEP = 10.0  # factor
TILES = 4
HALVES = (torch.bfloat16, torch.float16)
TOKENS_OF_HALVES = 4096  # whose products a GPU adds up before they are added to the sum in float32
DEAD_DIAGONAL = 1e-9  # of the mean diagonal: what a dead input gets where the matrix must be positive definite


def no_reduction(tensor: torch.Tensor) -> torch.Tensor:
    """The all-reduce of a single process: return the tensor."""
    return tensor


class Statistic(Protocol):
    """A statistic that is collected over calibration windows."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs of some windows, [windows, tokens, columns], any float dtype."""

    def finish(self, all_reduce: AllReduce = no_reduction) -> None:
        """After the last window: add up over all processes."""

    def include(self, other: Self) -> None:
        """After `finish`: add what another finished one has seen, of as many columns."""

    def reorder(self, order: torch.Tensor) -> None:
        """After `finish`: reorder the columns; column `order[k]` becomes the k-th; order: [columns], int64."""


class NoStatistic:
    """For scores of the weights alone."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: torch.Tensor) -> None: ...

    def finish(self, all_reduce: AllReduce = no_reduction) -> None: ...

    def include(self, other: Self) -> None: ...

    def reorder(self, order: torch.Tensor) -> None: ...


class SquaredNorm:
    """Wanda's statistic: the mean over windows of each input's squared norm over the window's tokens.

    value: [columns], float32. Windows are added one at a time, as published, so that the micro-batch does not change the rounding.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.value = torch.zeros(columns, dtype=torch.float32, device=device)
        self.windows = 0

    def add(self, inputs: torch.Tensor) -> None:
        for squared_norm in _squared_norms(inputs):
            self.value *= self.windows / (self.windows + 1)
            self.windows += 1
            self.value += squared_norm / self.windows

    def finish(self, all_reduce: AllReduce = no_reduction) -> None:
        all_windows = int(all_reduce(torch.tensor(self.windows)))
        self.value *= self.windows / all_windows
        all_reduce(self.value)
        self.windows = all_windows

    def include(self, other: Self) -> None:
        all_windows = self.windows + other.windows
        self.value = (self.value * self.windows + other.value * other.windows) / all_windows
        self.windows = all_windows

    def reorder(self, order: torch.Tensor) -> None:
        self.value = self.value[order]

    @property
    def squared_norm(self) -> torch.Tensor:
        """[columns], float32."""
        return self.value


class Moments:
    """DSnoT's statistic: each input's mean, variance and mean square over tokens, [columns], float32; complete after `finish`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, columns, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sums += torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)])
        self.tokens += len(tokens)

    def finish(self, all_reduce: AllReduce = no_reduction) -> None:
        self.tokens = int(all_reduce(torch.tensor(self.tokens)))
        all_reduce(self.sums)

    def include(self, other: Self) -> None:
        self.sums += other.sums
        self.tokens += other.tokens

    def reorder(self, order: torch.Tensor) -> None:
        self.sums = self.sums[:, order]

    def require_finite(self) -> None:
        """Raise ArithmeticError if a moment is NaN or infinite."""
        if not torch.isfinite(self.sums).all():
            raise ArithmeticError("the inputs' moments have NaN or infinity")

    @property
    def mean(self) -> torch.Tensor:
        return (self.sums[0] / self.tokens).float()

    @property
    def variance(self) -> torch.Tensor:
        mean, mean_square = self.sums / self.tokens
        return (mean_square - mean.square()).clamp_min(0).float()

    @property
    def squared_norm(self) -> torch.Tensor:
        return (self.sums[1] / self.tokens).float()


class Gram:
    """SparseGPT's statistic: H = X Xᵀ, summed over tokens (arXiv:2301.00774, section 3.1).

    value: [columns, columns], float32; complete after `finish`. tokens: their number, likewise.
    damping: that of the factor, None before it is computed.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.value = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0
        self.damping: float | None = None
        self._factor: torch.Tensor | None = None
        self._factored_with: tuple[float, bool] | None = None
        self._tile = -(-columns // TILES)

    def add(self, inputs: torch.Tensor) -> None:
        """Add to the tiles on and below the diagonal: the matrix is symmetric, and 3/8 of its 4 by 4 tiles need no product."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(tokens)
        if tokens.is_cuda and tokens.dtype in HALVES:
            add_products = add_products_of_halves
        else:
            tokens, add_products = tokens.float(), add_products_in_float32
        for first in range(0, len(self.value), self._tile):
            last = first + self._tile
            add_products(self.value[first:last, :last], tokens[:, first:last], tokens[:, :last])

    def finish(self, all_reduce: AllReduce = no_reduction) -> None:
        for first in range(0, len(self.value), self._tile):
            last = first + self._tile
            self.value[:first, first:last] = self.value[first:last, :first].T
        all_reduce(self.value)
        self.tokens = int(all_reduce(torch.tensor(self.tokens)))

    def include(self, other: Self) -> None:
        self.value += other.value
        self.tokens += other.tokens

    def reorder(self, order: torch.Tensor) -> None:
        self.value = self.value[order][:, order]
        self._factor = self.damping = self._factored_with = None

    @property
    def squared_norm(self) -> torch.Tensor:
        """[columns], float32: each input's squared norm over all tokens."""
        return self.value.diagonal()

    @property
    def dead(self) -> torch.Tensor:
        """[columns], bool: inputs that are zero in every token."""
        return self.value.diagonal() == 0

    def inverse_factor(self, damping: float, limit: float, per_entry: bool = False) -> torch.Tensor:
        """U, upper triangular with Uᵀ U = (H + d * mean(diag H) * I)⁻¹, or (H + d * diag H)⁻¹; computed once for all that share H.

        d is `damping`; if H does not factor with it in float32 or in float64, d is multiplied by ten, repeatedly, up to the
        limit. Dead inputs count as unit inputs.

        Args:
            damping, limit: fractions of the mean diagonal that are added to the diagonal, first and last.
            per_entry: they are fractions of each entry of the diagonal instead, so that the scale of an input does not matter.

        Returns:
            [columns, columns], float32.

        Raises:
            ArithmeticError: H has NaN or infinity, or is not positive definite even with the limit.
        """
        if self._factor is None or self._factored_with != (damping, per_entry):
            self.finite()
            self._factor = None  # its memory is free before the next one is made
            factor, self.damping = first_to_factor(lambda share: self._factored(share, per_entry), damping, limit)
            self._factor, self._factored_with = factor, (damping, per_entry)
        return self._factor

    def _factored(self, damping: float, per_entry: bool) -> torch.Tensor:
        try:
            return _inverse_factor(self.value, self.dead, damping, per_entry, torch.float32)
        except torch.linalg.LinAlgError:
            return _inverse_factor(self.value, self.dead, damping, per_entry, torch.float64)

    def inverse_diagonal(self, damping: float, limit: float, per_entry: bool = False) -> torch.Tensor:
        """The diagonal of the damped matrix's inverse, [columns], float32; see inverse_factor."""
        return self.inverse_factor(damping, limit, per_entry).square().sum(dim=0)

    def finite(self) -> torch.Tensor:
        """The matrix, [columns, columns], float32, checked.

        Raises:
            ArithmeticError: it has NaN or infinity.
        """
        if not torch.isfinite(self.value.diagonal()).all():
            raise ArithmeticError("found NaN or infinity in the Gram matrix of the inputs")
        return self.value

    def damped(self, damping: float) -> torch.Tensor:
        """A copy whose diagonal is multiplied by 1 + damping, [columns, columns], float32; dead inputs get a small diagonal.

        Raises:
            ArithmeticError: it has NaN or infinity.
        """
        damped, smallest = self.finite().clone(), DEAD_DIAGONAL * self.value.diagonal().mean()
        diagonal = damped.diagonal()
        diagonal.mul_(1 + damping)[self.dead] = smallest if smallest > 0 else 1
        return damped


def add_products_in_float32(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add leftᵀ right to a sum.

    Args:
        total: [columns of left, columns of right], float32, changed in place. left, right: [tokens, columns], float32.
    """
    total.addmm_(left.T, right)


def add_products_of_halves(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The same on a GPU for bfloat16 or float16: the matrix units multiply halves, without rounding, and add up in float32.

    Their sums lose more than those of float32 products, the more tokens are added up at once, hence some at a time.
    """
    for some_left, some_right in zip(left.split(TOKENS_OF_HALVES), right.split(TOKENS_OF_HALVES), strict=True):
        total += torch.mm(some_left.T, some_right, out_dtype=torch.float32)


def _squared_norms(inputs: torch.Tensor) -> torch.Tensor:
    """Of each input in each window, [windows, columns], float32. Args: inputs: [windows, tokens, columns], any float dtype."""
    if inputs.is_cuda:  # in one kernel, which reads halves
        return torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32).square_()
    return inputs.float().square().sum(dim=1)


def first_to_factor(attempt: Callable[[float], Result], damping: float, limit: float) -> tuple[Result, float]:
    """Call a function with rising damping until the matrix factors; return its result and that damping.

    Args:
        attempt: called with a damping; raises torch.linalg.LinAlgError if the matrix does not factor.
        damping: the first value; it is multiplied by ten each time. limit: the last value.

    Raises:
        ArithmeticError: the matrix does not factor with the limit either.
    """
    tried = damping
    while True:
        try:
            return attempt(tried), tried
        except torch.linalg.LinAlgError as error:
            if tried >= limit:
                raise ArithmeticError(
                    f"the Gram matrix of the inputs does not factor at any damping from {damping:g} to {limit:g}"
                ) from error
        tried = min(DAMPING_STEP * tried, limit)


def _inverse_factor(gram: torch.Tensor, dead: torch.Tensor, damping: float, per_entry: bool, dtype: torch.dtype) -> torch.Tensor:
    """U in float32, computed in `dtype`; see Gram.inverse_factor.

    H = R Rᵀ with R upper triangular is the Cholesky factorisation of H with rows and columns reversed; then U = R⁻¹.

    Raises:
        torch.linalg.LinAlgError: rounded to `dtype`, the damped matrix is not positive definite.
    """
    damped = gram.flip(0, 1).to(dtype)
    diagonal = damped.diagonal()
    share_of = diagonal.clone() if per_entry else gram.diagonal().to(dtype).mean()
    diagonal.add_(dead.flip(0).to(dtype)).add_(damping * share_of)
    factor = torch.linalg.cholesky(damped).flip(0, 1)
    factor = torch.linalg.solve_triangular(factor, torch.eye(len(gram), out=damped), upper=True).float()
    if not torch.isfinite(factor).all():
        raise torch.linalg.LinAlgError("the factor's inverse is not finite")
    return factor
