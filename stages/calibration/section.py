"""The section `calibration`: the windows that the statistics are collected on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stages.bos import bos_field
from stages.calibration.samplers import SAMPLERS, window_counts
from stages.schema import number, one_of, require, require_one_of


@dataclass(kw_only=True, slots=True)
class CalibrationSource:
    """A corpus of text.calibration, and how windows are cut out of it.

    weight: the fraction of the windows that come from it; the weights of all sources sum to 1.
    """

    sampler: str = one_of(*SAMPLERS)
    weight: float = number(above=0, maximum=1)


@dataclass(kw_only=True, slots=True)
class Calibration:
    """The number of windows and their sources.

    held_out: windows more, drawn likewise after the others, to which nothing is fitted: errors are measured on them, and they judge
        what is learned.
    window_length: tokens per window.
    bos: whether every window begins with the BOS token, see stages/bos.py.
    overlap_tokens: tokens in the n-grams by which the windows are compared with the evaluation text.
    max_overlap: number of these n-grams that may occur in it.
    max_refused: share of the dialogues read that the base's chat template may refuse; these are left out.
    sources: name of a corpus -> its source.
    """

    name: str
    windows: int = number(minimum=1)
    held_out: int = number(minimum=0, unit="windows")
    window_length: int = number(minimum=2, unit="tokens")
    bos: str = bos_field()
    seed: int
    overlap_tokens: int = number(minimum=1)
    max_overlap: int = number(minimum=0)
    max_refused: float = number(minimum=0, below=1)
    sources: dict[str, CalibrationSource]

    def check(self, key: str) -> None:
        total = sum(source.weight for source in self.sources.values())
        require(abs(total - 1) < 1e-6, f"{key}.sources", f"weights summing to {total:g}", "weights summing to 1")
        counts = window_counts({name: source.weight for name, source in self.sources.items()}, self.windows)
        without = next((name for name, count in counts.items() if not count), None)
        require(without is None, f"{key}.windows", self.windows, f"more, or another weight of {without}, which has none of them")


def check_text(calibration: Calibration, columns: Mapping[str, Collection[str] | None]) -> None:
    """Refuse a source that is not fetched, or whose rows are neither prose nor dialogues, before anything is downloaded.

    Args:
        columns: corpus of text.calibration -> columns that its reader returns; None if they depend on the file.

    Raises:
        ConfigError: names the source.
    """
    for name in calibration.sources:
        require_one_of("calibration.sources", name, list(columns) or ["(text.calibration is empty)"])
        reader_columns = columns[name]
        has_text = reader_columns is None or "text" in reader_columns or "messages" in reader_columns
        wanted = f'a corpus of rows with "text" or "messages", not with {", ".join(reader_columns or ())}'
        require(has_text, "calibration.sources", name, wanted)
