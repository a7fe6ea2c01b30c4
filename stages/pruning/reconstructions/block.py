"""Block: the kept weights of each block are trained to give the dense model's hidden states, see pruning.reconstruction."""

from dataclasses import dataclass

from stages.pruning.entries import Training
from stages.pruning.reconstruction import Reconstruction
from stages.schema import Citation, number


@dataclass(kw_only=True, slots=True)
class BlockSection:
    """epochs: passes over the calibration windows, one window a step.

    learning_rate: of the first step, a fraction of the size of the balanced weights, see pruning.learning; falls to 0.
    searched_blocks: how many blocks, from the first on, search for a better rate, on the windows held out; the first begins with the
        learning rate, every other block with the geometric mean of the rates that searches before it took. 0: none.
    """

    name: str
    epochs: int = number(minimum=1)
    learning_rate: float = number(above=0)
    searched_blocks: int = number(minimum=0)


BLOCK = Training(
    name="block",
    each_block=lambda section: Reconstruction(
        epochs=section.epochs, learning_rate=section.learning_rate, searched_blocks=section.searched_blocks
    ),
    label="reconstructed",
    parameters=BlockSection,
    summary="Adam on the kept weights of each block, toward the dense model's hidden states",
    citation=Citation(text="after Wagner et al. 2025", url="https://arxiv.org/abs/2510.14444"),
)
