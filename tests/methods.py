"""Methods that many tests prune by."""

from stages.pruning import method
from stages.pruning.method import Keep, Method

MAGNITUDE = Method(score=method.MAGNITUDE, update=Keep())
WANDA = Method(score=method.WANDA, update=Keep())


def sparsegpt(block_size: int = 16, limit: float = 1.0, score: method.Score | None = None) -> Method:
    """With a score, the mask is chosen before the sweep; without, in it."""
    update = method.SparseGpt(damping=0.01, damping_limit=limit, block_size=block_size, choose_while_sweeping=score is None)
    return Method(score=score or method.obs_score(0.01, limit), update=update)
