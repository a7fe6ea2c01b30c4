"""Draw the calibration windows, and refuse windows that overlap with the evaluation text.

python -m stages.sample
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos, decide
from stages.calibration.documents import Documents
from stages.calibration.overlap import NgramIndex
from stages.calibration.samplers import SAMPLERS, Sampler, Window, window_counts
from stages.calibration.section import Calibration
from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import embedding_rows, load_tokenizer, require_embedded
from stages.config.entry import stage
from stages.errors import CalibrationError, TextError
from stages.files import BASE, CALIBRATION, TEXT, replacing, sha256, write_json
from stages.rows import Rows

log = logging.getLogger(__name__)

SPARE = 8  # times as many candidates for the windows held out
SHOWN = 3  # windows of each source that are written as text
LOGGED = 400  # characters of each that are logged


@stage("calibration", "environment.transformers", "environment.tokenizers")
def main(calibration: Calibration) -> None:
    base = Checkpoint(BASE)
    base.require_context(calibration.window_length, "calibration.window_length")
    tokenizer = load_tokenizer(BASE)
    bos = decide(calibration.bos, tokenizer, "calibration.bos")
    log.info("windows %s with BOS: %s", "do not begin" if bos.token is None else "begin", bos.reason)
    drawn = draw(calibration, tokenizer, bos)
    rows = embedding_rows(base)
    for name, windows in drawn.items():
        for number, window in enumerate(windows.all, start=1):
            documents = " and ".join(map(str, window.documents(0, len(window.tokens))))
            require_embedded(window.tokens, rows, tokenizer, f"calibration.sources.{name}, window {number} (of document {documents})")
    refuse_overlap(calibration, drawn, tokenizer)
    with replacing(CALIBRATION) as directory:
        write(directory, calibration, drawn, base, tokenizer, bos)
    log.info("wrote %s: %d windows of %d tokens", CALIBRATION, calibration.windows, calibration.window_length)


def draw(calibration: Calibration, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> dict[str, "Drawn"]:
    """Draw the windows of each source; those held out come after the others, which are the same without them.

    Raises:
        CalibrationError: a source is too small; names it and states how many tokens it has.
        TextError: a row is neither prose nor a dialogue; names file and line. Or the chat template refuses too many dialogues.
    """
    drawn = {}
    weights = {name: source.weight for name, source in calibration.sources.items()}
    counts, held_out = window_counts(weights, calibration.windows), window_counts(weights, calibration.held_out)
    for name, source in calibration.sources.items():
        documents = Documents(Rows(TEXT / "calibration" / f"{name}.jsonl"), tokenizer, calibration.max_refused)
        log.info("read %s: %d documents", name, len(documents))
        try:
            windows, others = split(
                partial(sample, SAMPLERS.of(source), documents, calibration), counts[name], held_out[name], documents.content
            )
        except CalibrationError as error:
            documents.require_few_refused()
            some = f"; {held_out[name]} of them are held out (calibration.held_out)" if held_out[name] else ""
            raise CalibrationError(f"calibration.sources.{name} ({source.sampler} sampler): {error}{some}") from None
        documents.require_few_refused()
        if documents.refused:
            log.warning("%s: left out %d dialogues; the first: %s", name, len(documents.refused), next(iter(documents.refused.values())))
        drawn[name] = Drawn(
            windows=[window.begun_with(bos) for window in windows],
            held_out=[window.begun_with(bos) for window in others],
        )
    return drawn


def sample(sampler: Sampler, documents: Documents, calibration: Calibration, number: int) -> list[Window]:
    """Draw a number of windows of one source."""
    return sampler.function(documents, number, calibration.window_length, calibration.seed, documents.end)


def split(
    draw_windows: Callable[[int], list[Window]], count: int, held_out: int, content: Callable[[int], Hashable]
) -> tuple[list[Window], list[Window]]:
    """Draw windows, and windows held out, these from other documents, or of other tokens, as far as the corpus has them.

    Args:
        draw_windows: draws as many windows as it is asked for; the first are the same for every number.
        content: of a document's number, what only documents of the same text have in common.

    Raises:
        CalibrationError: the corpus is too small for both together.
    """
    if not held_out:
        return draw_windows(count), []
    try:
        windows = draw_windows(count + SPARE * held_out)
    except (CalibrationError, TextError):  # a corpus that has no more
        windows = draw_windows(count + held_out)
    fitted, candidates = windows[:count], windows[count:]
    content = cache(content)
    taken: dict[Hashable, set[int]] = defaultdict(set)
    for document, offset, number in (span for window in fitted for span in window.spans):
        taken[content(document)].update(range(offset, offset + number))

    def shared(window: Window) -> tuple[bool, int]:
        """Whether it has a document that is calibrated on, and how many tokens."""
        spans = [span for span in window.spans if content(span[0]) in taken]
        repeats = [taken[content(document)].intersection(range(offset, offset + number)) for document, offset, number in spans]
        return bool(spans), sum(map(len, repeats))

    others = sorted(candidates, key=shared)[:held_out]  # stable: the first that share none
    repeated, tokens = sum(shared(window)[1] for window in others), sum(len(window.tokens) for window in others)
    if repeated:
        words = "calibration.held_out: found %d of %d tokens in the windows that are calibrated on, too, wanted none: bring more text"
        log.warning(words, repeated, tokens)
    return fitted, others


class Drawn(NamedTuple):
    """The windows of one source."""

    windows: list[Window]
    held_out: list[Window]

    @property
    def all(self) -> list[Window]:
        return [*self.windows, *self.held_out]


class Overlap(NamedTuple):
    """An n-gram of a calibration window that also occurs in the evaluation text."""

    source: str
    window: Window
    start: int


def refuse_overlap(calibration: Calibration, drawn: dict[str, Drawn], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse windows with more than max_overlap n-grams that occur in an evaluation corpus or benchmark.

    Raises:
        CalibrationError: names the corpus, the number of such n-grams, and the words and the document of the first one.
    """
    size = calibration.overlap_tokens
    files = sorted((TEXT / "evaluation").glob("*.jsonl"))
    for file in tqdm(files, desc="comparing with the evaluation text", unit="corpus"):
        texts = [" ".join(_strings(row)) for row in Rows(file)]
        index = NgramIndex(tokenizer(texts, add_special_tokens=False)["input_ids"], size)
        overlaps = [
            Overlap(source, window, start)
            for source, windows in drawn.items()
            for window in windows.all
            for start in index.shared(window.tokens)
        ]
        if len(overlaps) > calibration.max_overlap:
            source, window, start = overlaps[0]
            words = tokenizer.decode(window.tokens[start : start + size])
            documents = " and ".join(map(str, window.documents(start, size)))
            raise CalibrationError(
                f"calibration text overlaps evaluation text: {len(overlaps)} {size}-grams of {source} are in {file.name}, "
                f"wanted at most calibration.max_overlap = {calibration.max_overlap}; the first, in document {documents}: {words!r}"
            )


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def first_windows(windows: list[Window], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first windows as text, with special tokens."""
    return [tokenizer.decode(window.tokens, skip_special_tokens=False) for window in windows[:SHOWN]]


def write(
    directory: Path, calibration: Calibration, drawn: dict[str, Drawn], base: Checkpoint, tokenizer: PreTrainedTokenizerBase, bos: Bos
) -> None:
    """Write windows.safetensors, "windows" and "held_out": [windows, length], int64, one source after another; and provenance.json."""
    tensors = {
        key: torch.tensor([window.tokens for source in drawn.values() for window in getattr(source, key)], dtype=torch.int64)
        for key in Drawn._fields
    }
    shaped = {key: tokens.view(-1, calibration.window_length) for key, tokens in tensors.items()}
    save_file(shaped, directory / "windows.safetensors")
    shown = {name: first_windows(source.windows, tokenizer) for name, source in drawn.items()}
    for name, texts in shown.items():
        for number, text in enumerate(texts, start=1):
            cut = text if len(text) <= LOGGED else f"{text[:LOGGED]}…"
            log.info("%s, window %d of %d: %s", name, number, len(drawn[name].windows), json.dumps(cut, ensure_ascii=False))
    write_json(
        directory / "provenance.json",
        {
            "section": asdict(calibration),
            "base": base.fingerprint,
            "tokenizer_sha256": base.tokenizer_sha256,
            "bos": bos.as_dict(),
            "windows_sha256": sha256(directory / "windows.safetensors"),
            "sources": {
                name: {
                    "sha256": sha256(TEXT / "calibration" / f"{name}.jsonl"),
                    "windows": [window.spans for window in source.windows],
                    "held_out": [window.spans for window in source.held_out],
                    "first_windows": shown[name],
                }
                for name, source in drawn.items()
            },
        },
    )


if __name__ == "__main__":
    main()
