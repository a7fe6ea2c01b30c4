"""Block: the kept weights of each block are trained to give the dense model's hidden states, see pruning.reconstruction."""

from dataclasses import dataclass

from stages.pruning.entries import Training
from stages.pruning.reconstruction import Reconstruction
from stages.schema import Citation, number


@dataclass(kw_only=True, slots=True)
class BlockSection:
    """epochs: passes over the calibration windows, one window a step.

    learning_rate: of the first step, a fraction of the size of the balanced weights, see pruning.learning; falls to 0.
    search: whether each block tries half or twice its rate as well, on the windows held out, and begins with what blocks before it
        took; the first begins with the learning rate.
    """

    name: str
    epochs: int = number(minimum=1)
    learning_rate: float = number(above=0)
    search: bool


BLOCK = Training(
    name="block",
    each_block=lambda section: Reconstruction(epochs=section.epochs, learning_rate=section.learning_rate, search=section.search),
    label="reconstructed",
    parameters=BlockSection,
    summary="Adam on the kept weights of each block, toward the dense model's hidden states",
    citation=Citation(text="after Wagner et al. 2025", url="https://arxiv.org/abs/2510.14444"),
)
