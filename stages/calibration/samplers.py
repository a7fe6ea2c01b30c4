"""From documents to calibration windows."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import NoneType
from typing import Protocol

from tqdm import tqdm

from stages.errors import CalibrationError
from stages.schema import Citation, Entry, Table

Span = tuple[int, int, int]  # document, offset of the first token in it, number of tokens


class TokenSequences(Protocol):
    """Documents as token ids, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> list[int]: ...


@dataclass(kw_only=True, slots=True)
class Window:
    """One calibration window.

    tokens: [window length], token ids.
    spans: the parts of documents that it is made of; end tokens belong to none.
    starts: the offset in the window at which each span begins.
    """

    tokens: list[int]
    spans: list[Span]
    starts: list[int]

    def documents(self, start: int, length: int) -> list[int]:
        """The documents in which the tokens [start, start + length) of the window lie, in order."""
        parts = zip(self.spans, self.starts, strict=True)
        return [document for (document, _, count), first in parts if first < start + length and start < first + count]


def document(documents: TokenSequences, windows: int, length: int, seed: int, end: int | None) -> list[Window]:
    """Draw a page, keep it if it is longer than the window, cut at random.

    As published, draw for draw (get_c4 of GPTQ, SparseGPT and Wanda): two draws of Python's generator for each window.

    Args:
        documents: token ids of each page, the start token included where the tokenizer adds one.
        windows, length: how many, of how many tokens.
        end: not used; the samplers share one signature.

    Raises:
        CalibrationError: no page is longer than `length`; says how long the longest is and how many tokens there are.
    """
    random = Random(seed)
    drawn: list[Window] = []
    lengths: dict[int, int] = {}
    with tqdm(total=windows, desc="drawing windows", unit="window") as progress:
        while len(drawn) < windows:
            index = random.randint(0, len(documents) - 1)
            if lengths.get(index, length + 1) <= length:
                continue
            tokens = documents[index]
            lengths[index] = len(tokens)
            if len(tokens) > length:
                offset = random.randint(0, len(tokens) - length - 1)
                drawn.append(Window(tokens=tokens[offset : offset + length], spans=[(index, offset, length)], starts=[0]))
                progress.update()
            elif len(lengths) == len(documents) and max(lengths.values()) <= length:
                raise CalibrationError(
                    f"no document has more than {length} tokens: the longest of {len(documents)} has {max(lengths.values())}, "
                    f"all together {sum(lengths.values())}; ask for shorter windows or the packed sampler"
                )
    return drawn


def packed(documents: TokenSequences, windows: int, length: int, seed: int, end: int | None) -> list[Window]:
    """Put all pages in an order drawn from `seed`, each followed by the end token, and cut; the rest is dropped.

    Args:
        end: id of the end token; None for a tokenizer without one.

    Raises:
        CalibrationError: the corpus has fewer tokens than asked for; says how many.
    """
    if windows == 0:
        return []
    order = list(range(len(documents)))
    Random(seed).shuffle(order)
    drawn: list[Window] = []
    window = Window(tokens=[], spans=[], starts=[])
    for index in order:
        page, offset = documents[index], 0
        text = page if end is None else [*page, end]
        while offset < len(text):
            taken = text[offset : offset + length - len(window.tokens)]
            from_page = min(len(taken), len(page) - offset)
            if from_page > 0:
                window.spans.append((index, offset, from_page))
                window.starts.append(len(window.tokens))
            window.tokens += taken
            offset += len(taken)
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
    """A way to cut windows out of documents, see the functions above; it has no parameters."""

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


def shares(weights: dict[str, float], windows: int) -> dict[str, int]:
    """The number of windows of each source by its weight, largest remainders first; they sum to `windows`."""
    exact = {name: weight * windows for name, weight in weights.items()}
    whole = {name: int(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: windows - sum(whole.values())]:
        whole[name] += 1
    return whole
