import json

import pytest

from stages import sample
from stages.config import Calibration, CalibrationSource
from stages.errors import CalibrationError
from tests import tiny


@pytest.fixture()
def workspace(canonical, tmp_path, monkeypatch):
    """Stage directories with a small base and small text."""
    monkeypatch.setattr(sample, "BASE", canonical)
    monkeypatch.setattr(sample, "TEXT", tmp_path)
    monkeypatch.setattr(sample, "CALIBRATION", tmp_path / "calibration_out")
    tiny.write_lines(tmp_path / "calibration/pages.jsonl", [{"text": text} for text in tiny.sentences(20, seed=4, length=90)])
    chat = [{"messages": [{"role": "user", "content": text}]} for text in tiny.sentences(20, seed=9, length=30)]
    tiny.write_lines(tmp_path / "calibration/chat.jsonl", chat)
    tiny.write_lines(tmp_path / "evaluation/articles.jsonl", [{"text": text} for text in tiny.sentences(20, seed=5)])
    return tmp_path


def calibration(**changes) -> Calibration:
    facts = {"name": "t", "windows": 6, "window_length": 32, "seed": 0, "overlap_tokens": 13, "max_overlap": 0}
    sources = {"pages": CalibrationSource(sampler="document", weight=1.0)}
    return Calibration(**{**facts, "sources": sources, **changes})


def test_a_mixture_takes_windows_by_weight_and_names_every_document(workspace):
    sources = {
        "pages": CalibrationSource(sampler="document", weight=0.5),
        "chat": CalibrationSource(sampler="packed", weight=0.5),
    }
    settings = calibration(sources=sources)
    drawn = sample.draw(settings, tiny.tokenizer())
    assert {name: len(windows) for name, windows in drawn.items()} == {"pages": 3, "chat": 3}
    (workspace / "out").mkdir()
    sample.write(workspace / "out", settings, drawn)
    provenance = json.loads((workspace / "out/provenance.json").read_text())
    assert [len(provenance["sources"][name]["windows"]) for name in sources] == [3, 3]


def test_a_source_that_is_too_small_is_named(workspace):
    with pytest.raises(CalibrationError, match=r"calibration.sources.pages \(document sampler\): no document has more than 500 tokens"):
        sample.draw(calibration(window_length=500), tiny.tokenizer())


@pytest.mark.parametrize("where", ["articles.jsonl", "task.jsonl"])
def test_text_that_is_evaluated_must_not_be_calibrated_on(workspace, where):
    leaked = tiny.sentences(20, seed=4, length=90)[3]
    row = {"text": leaked} if where == "articles.jsonl" else {"goal": "x", "choices": {"text": [leaked], "label": ["A"]}}
    tiny.write_lines(workspace / "evaluation" / where, [row])
    settings = calibration(windows=40)
    drawn = sample.draw(settings, tiny.tokenizer())
    with pytest.raises(CalibrationError, match=rf"13-grams of pages are in {where}, wanted at most .* in document 3: "):
        sample.refuse_overlap(settings, drawn, tiny.tokenizer())


def test_text_apart_passes(workspace):
    drawn = sample.draw(calibration(), tiny.tokenizer())
    sample.refuse_overlap(calibration(), drawn, tiny.tokenizer())
