"""Methods that many tests prune by."""

from stages.pruning.method import Damping, Method
from stages.pruning.scores import SCORES
from stages.pruning.updates import UPDATES


def made(score: str, update: str = "none", *, comparison_group: str = "row", limit: float = 1.0, **parameters: object) -> Method:
    """A method of a score without parameters and an update with those given."""
    return Method(
        name=score,
        score=SCORES[score].parameters(name=score),
        comparison_group=comparison_group,
        update=UPDATES[update].parameters(name=update, **parameters),
        damping=Damping(share=0.01, limit=limit, shrinkage=False),
    )


MAGNITUDE = made("magnitude")
WANDA = made("wanda")


def sparsegpt(block_size: int = 16, limit: float = 1.0, score: str = "obs") -> Method:
    """With obs the mask is chosen in the sweep, with other scores before it."""
    return made(score, "sparsegpt", limit=limit, block_size=block_size)
