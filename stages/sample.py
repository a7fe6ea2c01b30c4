"""Draw the calibration windows, and refuse text that the evaluation will score.

python -m stages.sample
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.calibration.documents import Documents, Rows
from stages.calibration.overlap import NgramIndex
from stages.calibration.samplers import SAMPLERS, Window, shares
from stages.checkpoint.reader import Checkpoint
from stages.config import Calibration, stage
from stages.errors import CalibrationError
from stages.files import BASE, CALIBRATION, TEXT, replacing, sha256, write_json

log = logging.getLogger(__name__)


@stage("calibration")
def main(calibration: Calibration) -> None:
    Checkpoint(BASE).require_context(calibration.window_length, "calibration.window_length")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    drawn = draw(calibration, tokenizer)
    refuse_overlap(calibration, drawn, tokenizer)
    with replacing(CALIBRATION) as directory:
        write(directory, calibration, drawn)
    log.info("wrote %s: %d windows of %d tokens", CALIBRATION, calibration.windows, calibration.window_length)


def draw(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Window]]:
    """The windows of each source.

    Raises:
        CalibrationError: a source is too small; names it and says how many tokens it has.
    """
    drawn = {}
    counts = shares({name: source.weight for name, source in calibration.sources.items()}, calibration.windows)
    for name, source in calibration.sources.items():
        documents = Documents(Rows(TEXT / "calibration" / f"{name}.jsonl"), tokenizer)
        log.info("read %s: %d documents", name, len(documents))
        sampler = SAMPLERS[source.sampler]
        try:
            drawn[name] = sampler(documents, counts[name], calibration.window_length, calibration.seed, documents.end)
        except CalibrationError as error:
            raise CalibrationError(f"calibration.sources.{name} ({source.sampler} sampler): {error}") from None
    return drawn


def refuse_overlap(calibration: Calibration, drawn: dict[str, list[Window]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse windows that share n-grams with any evaluation corpus or benchmark row.

    Raises:
        CalibrationError: names the corpus, the document, the shared words and how many there are.
    """
    files = sorted((TEXT / "evaluation").glob("*.jsonl"))
    for file in tqdm(files, desc="comparing with the evaluation text", unit="corpus", disable=None):
        texts = [" ".join(_strings(row)) for row in Rows(file)]
        index = NgramIndex(tokenizer(texts, add_special_tokens=False)["input_ids"], calibration.overlap_tokens)
        found = [(name, window, at) for name, windows in drawn.items() for window in windows for at in index.shared(window.tokens)]
        if len(found) > calibration.max_overlap:
            name, window, at = found[0]
            words = tokenizer.decode(window.tokens[at : at + calibration.overlap_tokens])
            raise CalibrationError(
                f"calibration text overlaps evaluation text: {len(found)} {calibration.overlap_tokens}-grams of {name} are in "
                f"{file.name}, wanted at most calibration.max_overlap = {calibration.max_overlap}; the first, in document "
                f"{window.spans[0][0]}: {words!r}"
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def write(directory: Path, calibration: Calibration, drawn: dict[str, list[Window]]) -> None:
    """windows.safetensors: "windows", [windows, length], int64, sources one after another; and provenance.json."""
    tokens = torch.tensor([window.tokens for windows in drawn.values() for window in windows])
    save_file({"windows": tokens}, directory / "windows.safetensors")
    write_json(
        directory / "provenance.json",
        {
            "name": calibration.name,
            "seed": calibration.seed,
            "tokenizer_sha256": Checkpoint(BASE).tokenizer_sha256,
            "windows_sha256": sha256(directory / "windows.safetensors"),
            "sources": {
                name: {
                    "sampler": calibration.sources[name].sampler,
                    "sha256": sha256(TEXT / "calibration" / f"{name}.jsonl"),
                    "windows": [window.spans for window in windows],
                }
                for name, windows in drawn.items()
            },
        },
    )


if __name__ == "__main__":
    main()
