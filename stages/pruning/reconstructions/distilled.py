"""Distilled: the kept weights of the last blocks are trained together to predict what the dense model predicts, see
pruning.distillation; those of each block before them to give its hidden states, see pruning.reconstruction.
"""

from dataclasses import dataclass

from stages.pruning.distillation import Distillation
from stages.pruning.entries import Training
from stages.pruning.reconstruction import Reconstruction
from stages.schema import Citation, checked, number


@dataclass(kw_only=True, slots=True)
class DistilledSection:
    """share: of the blocks, counted from the last, that are trained together; rounded to whole blocks, at least one.

    epochs: passes over the calibration windows in which they are, one window a step; the last may be a part of one.
    learning_rate: of the first step, a fraction of the size of the balanced weights, see pruning.learning; falls to 0.
    block_epochs: passes in which each block before them is trained alone; 0: none.
    block_learning_rate: likewise.
    search: whether each of these blocks tries half or twice its rate as well, on the windows held out, and begins with what blocks before
        it took; the first begins with the learning rate.
    """

    name: str
    share: float = checked(lambda share: 0 < share <= 1, "a share in (0, 1]")
    epochs: float = number(above=0)
    learning_rate: float = number(above=0)
    block_epochs: int = number(minimum=0)
    block_learning_rate: float = number(above=0)
    search: bool


def each_block(section: DistilledSection) -> Reconstruction | None:
    """Of the blocks before the last ones."""
    if not section.block_epochs:
        return None
    return Reconstruction(epochs=section.block_epochs, learning_rate=section.block_learning_rate, search=section.search)


def last_blocks(section: DistilledSection, blocks: int) -> Distillation:
    first = blocks - max(1, round(section.share * blocks))
    return Distillation(first=first, epochs=section.epochs, learning_rate=section.learning_rate)


DISTILLED = Training(
    name="distilled",
    each_block=each_block,
    last_blocks=last_blocks,
    label="distilled",
    parameters=DistilledSection,
    summary="Adam on the kept weights of the last blocks together, toward the dense model's next-token distributions",
    citation=Citation(text="Hinton et al. 2015", url="https://arxiv.org/abs/1503.02531"),
)
