import pytest

from stages.calibration.documents import Documents, Rows
from stages.errors import CalibrationError
from tests import tiny


def test_rows_are_read_by_number(tmp_path):
    rows = Rows(tiny.write_lines(tmp_path / "a.jsonl", [{"text": "é"}, {"text": "b"}, {"text": "c"}]))
    assert (len(rows), rows[2], rows[0]) == (3, {"text": "c"}, {"text": "é"})
    assert list(rows) == [{"text": "é"}, {"text": "b"}, {"text": "c"}]
    with pytest.raises(IndexError):
        rows[3]


def test_dialogues_go_through_the_models_own_template(tmp_path):
    tokenizer = tiny.tokenizer()
    messages = [{"role": "user", "content": "river stone"}, {"role": "assistant", "content": "lamp"}]
    documents = Documents(Rows(tiny.write_lines(tmp_path / "a.jsonl", [{"messages": messages}])), tokenizer)
    assert tokenizer.decode(documents[0]) == "<|user|>\nriver stone</s>\n<|assistant|>\nlamp</s>\n"
    assert documents.end is None


def test_dialogues_without_a_template_are_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    documents = Documents(Rows(tiny.write_lines(tmp_path / "a.jsonl", [{"messages": []}])), tokenizer)
    with pytest.raises(CalibrationError, match="the base's tokenizer has no chat template"):
        documents[0]


def test_prose_is_as_the_tokenizer_has_it(tmp_path):
    tokenizer = tiny.tokenizer()
    documents = Documents(Rows(tiny.write_lines(tmp_path / "a.jsonl", [{"text": "river stone"}])), tokenizer)
    assert documents[0] == tokenizer("river stone")["input_ids"]
    assert documents.end == tokenizer.eos_token_id
