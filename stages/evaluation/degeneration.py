"""Degeneration of generated text: empty answers, and repetition, which pruned models show before their perplexity does.

    distinct_n        = |different n-grams| / |n-grams|, of all answers together       # Li et al. 2016, arXiv:1510.03055
    repeated_4_grams  = mean over answers of 1 - |different 4-grams| / |4-grams|        # Welleck et al. 2020, arXiv:1908.04319

N-grams are of the base's tokens. Answers of fewer than 4 tokens have no share of repeated 4-grams.
"""

from collections.abc import Callable, Sequence
from typing import Any

from stages.evaluation.measurement import Better, Difference, Kind, Measurement
from stages.evaluation.statistics import difference_of_rows, mean, mean_of_rows

Tokenize = Callable[[str], list[int]]
FORMS = ("raw", "chat")
REPEATED = 4


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct(answers: Sequence[Sequence[int]], n: int) -> float | None:
    """distinct_n of answers as tokens; None if none has n tokens."""
    runs = [run for answer in answers for run in ngrams(answer, n)]
    return len(set(runs)) / len(runs) if runs else None


def repeated(answer: Sequence[int]) -> float | None:
    """The share of an answer's 4-grams that it has before; None if it has no 4-gram."""
    runs = ngrams(answer, REPEATED)
    return 1 - len(set(runs)) / len(runs) if runs else None


def measure(rows: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]] | None, tokenize: Tokenize) -> list[Measurement]:
    """Measure the answers of each form.

    Args:
        rows: a model's, see generation.generate. dense: the dense model's; None for the dense model itself.
        tokenize: of the base's tokenizer, without special tokens.
    """
    measured: list[Measurement] = []
    for form in FORMS:
        numbers = [number for number, row in enumerate(rows) if form in row]
        if numbers:
            ours = [str(rows[number][form]) for number in numbers]
            theirs = None if dense is None else [str(dense[number][form]) for number in numbers]
            measured += _of_form(form, ours, theirs, tokenize)
    return measured


def _of_form(form: str, ours: list[str], theirs: list[str] | None, tokenize: Tokenize) -> list[Measurement]:
    facts: dict[str, Any] = {"kind": Kind.GENERATION, "name": form, "counted": "answers"}
    tokens, other_tokens = [tokenize(text) for text in ours], None if theirs is None else [tokenize(text) for text in theirs]
    empty = [float(not text.strip()) for text in ours]
    others = None if theirs is None else [float(not text.strip()) for text in theirs]
    made = [_mean(empty, others, metric="empty", label="share of empty answers", **facts)]
    for n in (1, 2):
        value = distinct(tokens, n)
        reference = None if other_tokens is None else distinct(other_tokens, n)
        if value is not None:
            made.append(
                Measurement(
                    **facts,
                    metric=f"distinct_{n}",
                    label=f"distinct-{n}",
                    value=value,
                    count=len(ours),
                    clusters=len(ours),
                    better=Better.HIGHER,
                    dense=reference,
                    difference=None if reference is None else Difference(value=value - reference),
                )
            )
    shares = [repeated(answer) for answer in tokens]
    references = None if other_tokens is None else [repeated(answer) for answer in other_tokens]
    if any(share is not None for share in shares):
        made.append(_mean(shares, references, metric="repeated_4_grams", label="share of repeated 4-grams", **facts))
    return made


def _mean(ours: Sequence[float | None], theirs: Sequence[float | None] | None, **facts: Any) -> Measurement:
    """The mean of a share over the answers that have one; lower is better. Differences are of answers where both models' have one. Where
    every share is 0 or 1 the intervals are those of shares of rows, which have a width where all answers agree."""
    known = [share for share in ours if share is not None]
    estimate = mean_of_rows(known, range(len(known)))
    facts |= {"count": estimate.count, "clusters": estimate.clusters, "better": Better.LOWER}
    reference = [share for share in theirs or [] if share is not None]
    pairs = [(share, other) for share, other in zip(ours, theirs or [], strict=False) if share is not None and other is not None]
    if not pairs:
        return Measurement.of(estimate, **facts, dense=mean(reference).value if reference else None)
    compared = Difference.of(difference_of_rows([share for share, _ in pairs], [other for _, other in pairs], range(len(pairs))))
    return Measurement.of(estimate, **facts, dense=mean(reference).value, difference=compared)
