import json
from dataclasses import asdict

import pytest

from stages import sample
from stages.calibration.samplers import Window
from stages.calibration.section import Calibration, CalibrationSource
from stages.errors import CalibrationError, CheckpointError, TextError
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
    facts = {"name": "t", "windows": 6, "held_out": 0, "window_length": 32, "bos": "auto", "seed": 0, "overlap_tokens": 13}
    facts |= {"max_overlap": 0, "max_refused": 0.0}
    sources = {"pages": CalibrationSource(sampler="document", weight=1.0)}
    return Calibration(**{**facts, "sources": sources, **changes})


def test_a_mixture_takes_windows_by_weight_and_names_every_document(workspace, base):
    sources = {
        "pages": CalibrationSource(sampler="document", weight=0.5),
        "chat": CalibrationSource(sampler="packed", weight=0.5),
    }
    settings = calibration(sources=sources)
    drawn = sample.draw(settings, tiny.tokenizer(), tiny.NO_BOS)
    assert {name: len(source.windows) for name, source in drawn.items()} == {"pages": 3, "chat": 3}
    (workspace / "out").mkdir()
    sample.write(workspace / "out", settings, drawn, base, tiny.tokenizer(), tiny.NO_BOS)
    provenance = json.loads((workspace / "out/provenance.json").read_text())
    assert [len(provenance["sources"][name]["windows"]) for name in sources] == [3, 3]
    assert provenance["section"] == asdict(settings)
    assert provenance["base"] == base.fingerprint


def test_a_source_that_is_too_small_is_named(workspace):
    with pytest.raises(CalibrationError, match=r"calibration.sources.pages \(document sampler\): no document has more than 500 tokens"):
        sample.draw(calibration(window_length=500), tiny.tokenizer(), tiny.NO_BOS)


@pytest.mark.parametrize("where", ["articles.jsonl", "task.jsonl"])
def test_text_that_is_evaluated_must_not_be_calibrated_on(workspace, where):
    leaked = tiny.sentences(20, seed=4, length=90)[3]
    row = {"text": leaked} if where == "articles.jsonl" else {"goal": "x", "choices": {"text": [leaked], "label": ["A"]}}
    tiny.write_lines(workspace / "evaluation" / where, [row])
    settings = calibration(windows=40)
    drawn = sample.draw(settings, tiny.tokenizer(), tiny.NO_BOS)
    with pytest.raises(CalibrationError, match=rf"13-grams of pages are in {where}, wanted at most .* in document 3: "):
        sample.refuse_overlap(settings, drawn, tiny.tokenizer())


def test_text_apart_passes(workspace):
    drawn = sample.draw(calibration(), tiny.tokenizer(), tiny.NO_BOS)
    sample.refuse_overlap(calibration(), drawn, tiny.tokenizer())


@pytest.mark.parametrize(
    ("start", "end", "named"),
    [
        (-9, -4, "document 3"),
        (-4, 0, "document 3"),
        (-2, 2, "document 3 and 8"),  # the second token before the end token to the one after it
        (1, 5, "document 8"),
        (10, 20, "document 8"),
    ],
)
def test_the_document_that_overlaps_is_named_by_where_in_the_window_it_lies(workspace, start, end, named):
    """A packed window of documents 3 and 8: offsets count from the end token between them."""
    tokenizer = tiny.tokenizer()
    first, second = (tokenizer(text)["input_ids"] for text in tiny.sentences(2, seed=11, length=40))
    between = len(first)
    tokens = [*first, tokenizer.eos_token_id, *second]
    window = Window(tokens=tokens, spans=[(3, 0, len(first)), (8, 0, len(second))], starts=[0, between + 1])
    text = tokenizer.decode(tokens[between + start : between + end])
    tiny.write_lines(workspace / "evaluation/articles.jsonl", [{"text": text}])
    with pytest.raises(CalibrationError, match=rf"4-grams of pages are in articles.jsonl, .* the first, in {named}: "):
        sample.refuse_overlap(calibration(overlap_tokens=4), {"pages": sample.Drawn(windows=[window], held_out=[])}, tokenizer)


@pytest.mark.parametrize(
    ("sampler", "content", "message"),
    [
        ("packed", b"", "found no rows, wanted at least one"),
        ("document", b"", "found no rows, wanted at least one"),
        ("packed", b'{"question": "a"}\n', 'line 1: found question, wanted "text" for prose or "messages" for a dialogue'),
        ("document", b'{"text": null}\n', 'line 1, "text": found null, wanted a string'),
        ("packed", b'{"messages": "hello"}\n', 'line 1, "messages": found "hello", wanted a list of messages'),
        ("packed", b'{"messages": [{"role": "user"}]}\n', 'line 1, message 1: found role, wanted "content"'),
        ("packed", b'{"text": "a"\n', "line 1: not JSON in UTF-8"),
    ],
)
def test_a_corpus_that_is_none_is_named_with_its_file_and_line(workspace, sampler, content, message):
    (workspace / "calibration/pages.jsonl").write_bytes(content)
    sources = {"pages": CalibrationSource(sampler=sampler, weight=1.0)}
    with pytest.raises(TextError, match=rf"calibration/pages\.jsonl(, |: ){message}"):
        sample.draw(calibration(sources=sources), tiny.tokenizer(), tiny.NO_BOS)


@pytest.mark.parametrize("sampler", ["document", "packed"])
def test_a_corpus_of_empty_texts_is_too_small(workspace, sampler):
    tiny.write_lines(workspace / "calibration/pages.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(CalibrationError, match=rf"calibration.sources.pages \({sampler} sampler\)"):
        sample.draw(calibration(sources={"pages": CalibrationSource(sampler=sampler, weight=1.0)}), tiny.tokenizer(), tiny.NO_BOS)


def test_the_stage_writes_windows_and_their_provenance(workspace, base):
    sample.main.function(calibration())
    written = json.loads((workspace / "calibration_out/provenance.json").read_text())
    assert written["base"] == base.fingerprint
    assert set(written) == {"section", "base", "tokenizer_sha256", "bos", "windows_sha256", "sources"}
    assert written["bos"]["token"] is None


def test_the_first_windows_of_each_source_are_shown_as_text(workspace, caplog):
    sources = {"pages": CalibrationSource(sampler="document", weight=0.5), "chat": CalibrationSource(sampler="packed", weight=0.5)}
    with caplog.at_level("INFO"):
        sample.main.function(calibration(windows=8, sources=sources))
    written = json.loads((workspace / "calibration_out/provenance.json").read_text())["sources"]
    assert [len(written[name]["first_windows"]) for name in sources] == [3, 3]
    assert "<|user|>\n" in written["chat"]["first_windows"][0]
    assert any("</s>" in text for text in written["chat"]["first_windows"])
    shown = [message for message in caplog.messages if message.startswith("chat, window 1 of 4: ")]
    assert json.loads(shown[0].partition(": ")[2]).removesuffix("…") == written["chat"]["first_windows"][0][: sample.LOGGED]


def test_dialogues_that_were_left_out_are_counted(workspace, caplog):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% if messages | length < 2 %}{{ raise_exception('no answer') }}{% endif %}" + tiny.CHAT_TEMPLATE
    turns = [{"role": "user", "content": text} for text in tiny.sentences(2, seed=9, length=90)]
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"messages": turns}, {"messages": turns}]
    tiny.write_lines(workspace / "calibration/chat.jsonl", rows)
    sources = {"chat": CalibrationSource(sampler="packed", weight=1.0)}
    drawn = sample.draw(calibration(windows=15, sources=sources, max_refused=0.5), tokenizer, tiny.NO_BOS)
    assert {span[0] for window in drawn["chat"].windows for span in window.spans} <= {0, 2, 3}
    with pytest.raises(TextError, match=r"chat\.jsonl, line 2: .*refuses this dialogue \(no answer\); found 1 such rows in"):
        sample.draw(calibration(windows=15, sources=sources), tokenizer, tiny.NO_BOS)


def test_too_few_tokens_for_what_was_left_out_says_so(workspace):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    sources = {"chat": CalibrationSource(sampler="packed", weight=1.0)}
    with pytest.raises(TextError, match=r"refuses this dialogue \(no\); found 19 such rows in 20"):
        sample.draw(calibration(sources=sources, max_refused=0.9), tokenizer, tiny.NO_BOS)


def test_a_token_beyond_the_embedding_is_named(workspace, monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    highest = len(tokenizer) - 1
    monkeypatch.setattr(sample, "embedding_rows", lambda base: highest)
    monkeypatch.setattr(sample, "load_tokenizer", lambda _: tokenizer)
    tiny.write_lines(workspace / "calibration/pages.jsonl", [{"text": f"<new> {text}"} for text in tiny.sentences(20, seed=4, length=90)])
    message = rf"calibration.sources.pages, window 1 \(of document .*\): found the token '<new>' with id {highest}, wanted ids below"
    with pytest.raises(CheckpointError, match=message):
        sample.main.function(calibration(windows=40, sources={"pages": CalibrationSource(sampler="packed", weight=1.0)}))


def test_windows_held_out_change_no_other_window_and_lie_in_other_documents(workspace):
    sources = {name: CalibrationSource(sampler=sampler, weight=0.5) for name, sampler in (("pages", "document"), ("chat", "packed"))}
    alone, both = (
        sample.draw(calibration(sources=sources, windows=4, held_out=held_out), tiny.tokenizer(), tiny.NO_BOS) for held_out in (0, 4)
    )
    for name in sources:
        assert both[name].windows == alone[name].windows
        assert (len(alone[name].held_out), len(both[name].held_out)) == (0, 2)
        fitted, held_out = (
            {span[0] for window in windows for span in window.spans} for windows in (both[name].windows, both[name].held_out)
        )
        assert not fitted & held_out


def test_where_no_other_documents_are_left_windows_held_out_are_others_of_the_same(workspace):
    tiny.write_lines(workspace / "calibration/pages.jsonl", [{"text": tiny.sentences(1, seed=4, length=300)[0]}])
    drawn = sample.draw(calibration(windows=3, held_out=2), tiny.tokenizer(), tiny.NO_BOS)["pages"]
    assert len(drawn.held_out) == 2
    assert not any(window in drawn.windows for window in drawn.held_out)


def test_documents_of_the_same_text_are_the_same_document_to_windows_held_out(workspace, caplog):
    texts = tiny.sentences(4, seed=4, length=90)
    tiny.write_lines(workspace / "calibration/pages.jsonl", [{"text": text} for text in texts * 5])
    drawn = sample.draw(calibration(windows=3, held_out=2), tiny.tokenizer(), tiny.NO_BOS)["pages"]
    fitted, held_out = ({span[0] % 4 for window in windows for span in window.spans} for windows in (drawn.windows, drawn.held_out))
    if fitted & held_out:  # the few texts do not suffice
        assert "tokens in the windows that are calibrated on, too" in caplog.text
    else:
        assert "calibrated on, too" not in caplog.text


def test_windows_held_out_are_those_that_repeat_the_fewest_tokens_and_what_they_repeat_is_said(caplog):
    offsets = [0, 40, 36, 10, 90, 78, 45, 30, 39]  # of windows of 10 tokens of one document
    drawn = [Window(tokens=list(range(offset, offset + 10)), spans=[(0, offset, 10)], starts=[0]) for offset in offsets]
    fitted, held_out = sample.split(lambda number: drawn[:number], 2, 5, lambda document: document)
    assert [window.spans[0][1] for window in fitted] == [0, 40]
    assert [window.spans[0][1] for window in held_out] == [10, 90, 78, 30, 45]
    assert caplog.messages == [
        "calibration.held_out: found 5 of 50 tokens in the windows that are calibrated on, too, wanted none: bring more text"
    ]
