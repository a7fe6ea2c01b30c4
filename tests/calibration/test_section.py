import pytest

from stages import schema
from stages.calibration.samplers import SAMPLERS
from stages.calibration.section import Calibration, CalibrationSource, check_text
from stages.errors import ConfigError


def calibration(**changes) -> Calibration:
    facts = {"name": "t", "windows": 6, "held_out": 0, "window_length": 32, "bos": "auto", "seed": 0, "overlap_tokens": 13}
    facts |= {"max_overlap": 0, "max_refused": 0.0}
    return Calibration(**{**facts, "sources": {"pages": CalibrationSource(sampler="document", weight=1.0)}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 0}, "calibration.windows: found 0, wanted at least 1"),
        ({"window_length": 1}, "calibration.window_length: found 1, wanted at least 2 tokens"),
        ({"overlap_tokens": 0}, "calibration.overlap_tokens: found 0, wanted at least 1"),
        ({"max_overlap": -1}, "calibration.max_overlap: found -1, wanted 0 or more"),
        ({"max_refused": 1.0}, r"calibration.max_refused: found 1.0, wanted a number in \[0, 1\)"),
        (
            {"windows": 8, "sources": {name: CalibrationSource(sampler="packed", weight=of) for name, of in (("a", 0.95), ("b", 0.05))}},
            "calibration.windows: found 8, wanted more, or another weight of b, which has none of them",
        ),
        ({"sources": {}}, "calibration.sources: found 'weights summing to 0', wanted weights summing to 1"),
        (
            {"sources": {"a": CalibrationSource(sampler="guess", weight=1.0)}},
            "calibration.sources.a.sampler: found 'guess', wanted one of document, packed",
        ),
        (
            {"sources": {"a": CalibrationSource(sampler="packed", weight=0.0)}},
            r"calibration.sources.a.weight: found 0.0, wanted a number in \(0, 1\]",
        ),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        schema.check(calibration(**changes), "calibration")


def test_every_sampler_is_taken():
    for sampler in SAMPLERS:
        schema.check(calibration(sources={"a": CalibrationSource(sampler=sampler, weight=1.0)}), "calibration")


@pytest.mark.parametrize("columns", [None, ("text",), ("messages",), ("text", "url")])
def test_prose_and_dialogues_are_taken(columns):
    check_text(calibration(), {"pages": columns})


def test_a_source_that_is_not_fetched_is_refused():
    with pytest.raises(ConfigError, match="calibration.sources: found 'pages', wanted one of other"):
        check_text(calibration(), {"other": None})
    with pytest.raises(ConfigError, match=r"calibration.sources: found 'pages', wanted one of \(text.calibration is empty\)"):
        check_text(calibration(), {})


def test_a_source_of_questions_is_refused():
    with pytest.raises(ConfigError, match='calibration.sources: found \'pages\', wanted a corpus of rows with "text" or "messages", not w'):
        check_text(calibration(), {"pages": ("goal", "sol1")})
