"""What is remembered of a layer's inputs: running means over windows, in float32, whatever the micro-batch.

Matrices that read the same input share one statistic.
"""

from typing import Protocol

import torch


class Statistic(Protocol):
    """Collects over calibration windows."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of some windows, [windows, tokens, columns], any float dtype."""


class NoStatistic:
    """For scores that look at weights alone."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: torch.Tensor) -> None: ...


class SquaredNorm:
    """Wanda's statistic: the mean over windows of each input's squared norm over the window's tokens.

    value: [columns], float32. Windows enter one by one, as published, so that the micro-batch changes no rounding here.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.value = torch.zeros(columns, dtype=torch.float32, device=device)
        self.windows = 0

    def add(self, inputs: torch.Tensor) -> None:
        for norm in torch.linalg.vector_norm(inputs.float(), dim=1):
            self.value *= self.windows / (self.windows + 1)
            self.windows += 1
            self.value += norm.square() / self.windows


class Gram:
    """SparseGPT's statistic: H = 2 X Xᵀ, mean over windows (arXiv:2301.00774, section 3.1).

    value: [columns, columns], float32.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.value = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.windows = 0
        self._factor: tuple[float, torch.Tensor] | None = None

    def add(self, inputs: torch.Tensor) -> None:
        windows, _, columns = inputs.shape
        rows = inputs.reshape(-1, columns).float()
        before, self.windows = self.windows, self.windows + windows
        self.value.addmm_(rows.T, rows, beta=before / self.windows, alpha=2 / self.windows)

    @property
    def dead(self) -> torch.Tensor:
        """[columns], bool: inputs that were zero in every token."""
        return self.value.diagonal() == 0

    def inverse_factor(self, damping: float) -> torch.Tensor:
        """U, upper triangular with Uᵀ U = (H + damping * mean(diag H) * I)⁻¹; computed once for all that share H.

        Dead inputs count as unit inputs.

        Args:
            damping: share of the mean diagonal added to the diagonal.

        Returns:
            [columns, columns], float32.

        Raises:
            ArithmeticError: H has NaN or infinity, or is not positive definite even with the damping.
        """
        if self._factor is None or self._factor[0] != damping:
            self._factor = damping, _inverse_factor(self.value, self.dead, damping)
        return self._factor[1]


def _inverse_factor(gram: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    if not torch.isfinite(gram).all():
        raise ArithmeticError("found NaN or infinity in the Gram matrix of the inputs")
    damped = gram.clone()
    damped.diagonal().add_(dead.float()).add_(damping * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ArithmeticError(f"the Gram matrix of the inputs does not factor at damping {damping}; raise method.damping")
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise ArithmeticError(f"the inverse Gram matrix does not factor at damping {damping}; raise method.damping")
    return factor
