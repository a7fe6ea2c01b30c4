"""What a metric of text is: what it sees of every token, and the numbers that it makes of all.

A model is run over the windows of a corpus, and its logits are in memory for some tokens at a time. A metric keeps a few numbers of each
token (`observe`), and makes its measurements of those of the whole corpus (`measure`). Several metrics share one run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, TypeAlias

import torch

from stages.evaluation.measurement import Kind, Measurement
from stages.schema import Entry


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the models predict for some tokens.

    tokens: [tokens], int64, the tokens that come. log_probabilities: [tokens, vocabulary], float32, the model's [nats].
    dense: the same of the dense model; None unless a metric asks for it.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    dense: torch.Tensor | None

    def of_tokens(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """The log-probability of each token that comes, [tokens], float32."""
        return log_probabilities.gather(1, self.tokens[:, None])[:, 0]


Observed: TypeAlias = Mapping[str, torch.Tensor]  # name -> [windows, tokens - 1], float32
WindowMeans: TypeAlias = Mapping[str, Sequence[float]]  # name -> the mean over each window


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The windows of a corpus.

    name: in text.evaluation. windows: [windows, tokens], int64. clusters: of each window, the document that most of its tokens are of.
    available: number of windows of the whole corpus; None: not known.
    """

    name: str
    windows: torch.Tensor
    clusters: Sequence[int]
    available: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The fields that every measurement of the corpus has."""
        scored = len(self.windows) * (self.windows.shape[1] - 1)
        return {
            "kind": Kind.CORPUS,
            "name": self.name,
            "count": scored,
            "counted": "tokens",
            "clusters": len(set(self.clusters)),
        }


def window_means(values: torch.Tensor) -> list[float]:
    """The mean of [windows, tokens] over the tokens of each window, summed in float64."""
    return values.double().mean(dim=1).tolist()


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How a measurement is shown, and how two models are compared by it: what tables, page and model card derive from.

    metric: the measurement's name. digits: decimals in which it is written.
    headline: whether it has plots, and its place in tables from the start; the page's table shows others when they are chosen.
    heading: of its column in `make show`; "": it has none. words: what the model card calls it; "": it has no row there.
    kept: the name in Metric.kept of the window means that it is made of, by which two models are compared window by window; None: they
        are not.
    ratio: whether it is the exponential of the mean over windows, so that two models differ by a factor; otherwise it is the mean itself.
    scale: by which the mean is multiplied, such as 100 for percent.
    itself: its value for the dense model against itself; None: the dense model is measured like any other.
    against: symbol -> the measurement that says beside it in the model card how far the dense model is; empty: the difference does.
    """

    metric: str
    digits: int
    headline: bool = False
    heading: str = ""
    words: str = ""
    kept: str | None = None
    ratio: bool = False
    scale: float = 1.0
    itself: float | None = None
    against: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metric(Entry):
    """A metric of text.

    needs_dense: whether it compares with the dense model's predictions of the same tokens, and so is of the pruned model alone.
    observe: from predictions to what is kept of each token: name -> [tokens], float.
    kept: the names of those of them whose mean over each window is written to windows.json.
    measure: from what was observed on a corpus, and the dense model's window means by name (None for the dense model itself), to
        measurements.
    shown: those of them that tables, page and model card show, in their order; others are in files alone.
    """

    needs_dense: bool
    observe: Callable[[Predictions], dict[str, torch.Tensor]]
    kept: tuple[str, ...]
    measure: Callable[[Corpus, Observed, WindowMeans | None], list[Measurement]]
    shown: tuple[Shown, ...]
    parameters: type = NoneType
