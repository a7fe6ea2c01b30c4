"""Documents -> windows.

document: as published for GPTQ, SparseGPT and Wanda: draw a page, keep it if it is longer than the window, cut at random.
packed:   shuffle all pages, join them with the end token, cut: no token wasted, windows of any length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from tqdm import tqdm

from stages.errors import CalibrationError


class TokenSequences(Protocol):
    """Documents as token ids, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> list[int]: ...


@dataclass(kw_only=True, slots=True)
class Window:
    """One calibration window.

    tokens: [window length], token ids.
    spans: the parts it is made of: (document, offset of the first token in it, number of tokens), end tokens apart.
    """

    tokens: list[int]
    spans: list[tuple[int, int, int]]


def document(documents: TokenSequences, windows: int, length: int, seed: int, end: int | None) -> list[Window]:
    """The published procedure, draw for draw (Wanda's lib/data.py): two draws of Python's generator for each window.

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
    progress = tqdm(total=windows, desc="drawing windows", unit="window", disable=None)
    while len(drawn) < windows:
        index = random.randint(0, len(documents) - 1)
        if lengths.get(index, length + 1) <= length:
            continue
        tokens = documents[index]
        lengths[index] = len(tokens)
        if len(tokens) > length:
            offset = random.randint(0, len(tokens) - length - 1)
            drawn.append(Window(tokens=tokens[offset : offset + length], spans=[(index, offset, length)]))
            progress.update()
        elif len(lengths) == len(documents) and max(lengths.values()) <= length:
            raise CalibrationError(
                f"no document has more than {length} tokens: the longest of {len(documents)} has {max(lengths.values())}, "
                f"all together {sum(lengths.values())}; ask for shorter windows or the packed sampler"
            )
    return drawn


def packed(documents: TokenSequences, windows: int, length: int, seed: int, end: int | None) -> list[Window]:
    """All pages in an order drawn from `seed`, each followed by the end token, cut into windows; the rest is dropped.

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
    tokens: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for index in order:
        page, offset = documents[index], 0
        text = page if end is None else [*page, end]
        while offset < len(text):
            taken = text[offset : offset + length - len(tokens)]
            from_page = min(len(taken), len(page) - offset)
            if from_page > 0:
                spans.append((index, offset, from_page))
            tokens, offset = tokens + taken, offset + len(taken)
            if len(tokens) == length:
                drawn.append(Window(tokens=tokens, spans=spans))
                tokens, spans = [], []
                if len(drawn) == windows:
                    return drawn
    found = len(drawn) * length + len(tokens)
    raise CalibrationError(
        f"the corpus has {found} tokens in {len(documents)} documents, wanted {windows} windows of {length} = {windows * length}"
    )


SAMPLERS: dict[str, Callable[[TokenSequences, int, int, int, int | None], list[Window]]] = {
    "document": document,
    "packed": packed,
}


def shares(weights: dict[str, float], windows: int) -> dict[str, int]:
    """Windows of each source by its weight, largest remainders first, summing to `windows`."""
    exact = {name: weight * windows for name, weight in weights.items()}
    whole = {name: int(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: windows - sum(whole.values())]:
        whole[name] += 1
    return whole
