"""Samplers: cut calibration windows out of documents."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import NoneType
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from stages.bos import Bos
from stages.errors import CalibrationError
from stages.schema import Citation, Entry, Table

Span = tuple[int, int, int]  # document, offset of the first token in it, number of tokens


class TokenSequences(Protocol):
    """Documents as token ids, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> list[int]: ...


@dataclass(kw_only=True, slots=True)
class Window:
    """One calibration window.

    tokens: [window length], token ids.
    spans: the spans of documents that make up the window; end tokens belong to no span.
    starts: the offset in the window at which each span begins.
    """

    tokens: list[int]
    spans: list[Span]
    starts: list[int]

    def begun_with(self, bos: Bos) -> "Window":
        """The window begun with BOS, without its last token, if BOS is decided for and is not there already."""
        if bos.token is None or self.tokens[0] == bos.token:
            return self
        tokens, shift = [bos.token, *self.tokens[:-1]], 1
        placed = [
            ((document, offset, min(count, len(tokens) - start - shift)), start + shift)
            for (document, offset, count), start in zip(self.spans, self.starts, strict=True)
            if start + shift < len(tokens)
        ]
        return Window(tokens=tokens, spans=[span for span, _ in placed], starts=[start for _, start in placed])

    def documents(self, start: int, length: int) -> list[int]:
        """Indices of the documents that contain the tokens [start, start + length) of the window, in order."""
        placed_spans = zip(self.spans, self.starts, strict=True)
        return [document for (document, _, count), first in placed_spans if first < start + length and start < first + count]


def document(documents: TokenSequences, windows: int, length: int, seed: int, end: int | None) -> list[Window]:
    """Draw a page at random, keep it if it is longer than the window, and cut a window at a random offset.

    Makes the same random draws as the published code (get_c4 of GPTQ, SparseGPT and Wanda): two of Python's generator per window.
    No page is tokenised twice: of those that are too short the length is kept, of the others, at most one a window, the tokens.

    Args:
        documents: token ids of each page, including the start token if the tokenizer adds one.
        windows: number of windows. length: tokens per window.
        end: not used; all samplers have the same signature.

    Raises:
        CalibrationError: no page is longer than `length`; states the length of the longest page and the number of tokens.
    """
    random = Random(seed)
    drawn: list[Window] = []
    lengths: dict[int, int] = {}
    kept: dict[int, npt.NDArray[np.uint32]] = {}
    with tqdm(total=windows, desc="drawing windows", unit="window") as progress:
        while len(drawn) < windows:
            index = random.randint(0, len(documents) - 1)
            if lengths.get(index, length + 1) <= length:
                continue
            if index not in kept:
                tokens = np.asarray(documents[index], dtype=np.uint32)
                lengths[index] = len(tokens)
                if len(tokens) > length:
                    kept[index] = tokens
            if index in kept:
                offset = random.randint(0, lengths[index] - length - 1)
                tokens = kept[index][offset : offset + length].tolist()
                drawn.append(Window(tokens=tokens, spans=[(index, offset, length)], starts=[0]))
                progress.update()
            elif len(lengths) == len(documents) and max(lengths.values()) <= length:
                raise CalibrationError(
                    f"no document has more than {length} tokens: the longest of {len(documents)} has {max(lengths.values())}, "
                    f"all together {sum(lengths.values())}; ask for shorter windows or the packed sampler"
                )
    return drawn


def packed(documents: TokenSequences, windows: int, length: int, seed: int, end: int | None) -> list[Window]:
    """Concatenate all pages in an order drawn from `seed`, each followed by the end token, and cut; the rest is dropped.

    A page without tokens adds no end token: windows are of text, not of the marks between texts.

    Args:
        end: id of the end token; None for a tokenizer without one.

    Raises:
        CalibrationError: the corpus has too few tokens; states how many it has.
    """
    if windows == 0:
        return []
    order = list(range(len(documents)))
    Random(seed).shuffle(order)
    drawn: list[Window] = []
    window = Window(tokens=[], spans=[], starts=[])
    for index in order:
        page, offset = documents[index], 0
        text = page if end is None or not page or page[-1] == end else [*page, end]
        while offset < len(text):
            piece = text[offset : offset + length - len(window.tokens)]
            page_tokens = min(len(piece), len(page) - offset)
            if page_tokens > 0:
                window.spans.append((index, offset, page_tokens))
                window.starts.append(len(window.tokens))
            window.tokens += piece
            offset += len(piece)
            if len(window.tokens) == length:
                drawn.append(window)
                window = Window(tokens=[], spans=[], starts=[])
                if len(drawn) == windows:
                    return drawn
    total = len(drawn) * length + len(window.tokens)
    raise CalibrationError(
        f"the corpus has {total} tokens in {len(documents)} documents, wanted {windows} windows of {length} = {windows * length}"
    )


@dataclass(frozen=True, kw_only=True)
class Sampler(Entry):
    """A way to cut windows out of documents, see `document` and `packed`; it has no parameters."""

    function: Callable[[TokenSequences, int, int, int, int | None], list[Window]]
    parameters: type = NoneType


SAMPLERS = Table(
    [
        Sampler(
            name="document",
            function=document,
            summary="each window lies in one document, drawn among those that are longer",
            citation=Citation(text="Frantar et al. 2023", url="https://arxiv.org/abs/2210.17323"),
        ),
        Sampler(
            name="packed",
            function=packed,
            summary="all documents, shuffled and joined by the end token, are cut into windows of any length",
        ),
    ],
    key="sampler",
)


def window_counts(weights: dict[str, float], windows: int) -> dict[str, int]:
    """Compute the number of windows of each source from its weight, rounded by largest remainder; they sum to `windows`."""
    quotas = {name: weight * windows for name, weight in weights.items()}
    counts = {name: int(quota + 1e-9) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: windows - sum(counts.values())]:
        counts[name] += 1
    return counts
