import pytest
from tokenizers import processors

from stages.calibration.documents import Documents
from stages.errors import CalibrationError, TextError
from stages.rows import Rows
from tests import tiny

DIALOGUE = {"messages": [{"role": "user", "content": "river stone"}, {"role": "assistant", "content": "lamp"}]}


def documents(tmp_path, *rows, tokenizer=None) -> Documents:
    return Documents(Rows(tiny.write_lines(tmp_path / "a.jsonl", rows)), tokenizer or tiny.tokenizer())


def test_dialogues_go_through_the_models_own_template(tmp_path):
    dialogues = documents(tmp_path, DIALOGUE)
    assert tiny.tokenizer().decode(dialogues[0]) == "<|user|>\nriver stone</s>\n<|assistant|>\nlamp</s>\n"
    assert dialogues.end is None


def test_dialogues_without_a_template_are_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="the base's tokenizer has no chat template"):
        documents(tmp_path, {"messages": []}, tokenizer=tokenizer)[0]


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + tiny.CHAT_TEMPLATE
SYSTEM = {"messages": [{"role": "system", "content": "be brief"}, *DIALOGUE["messages"]]}


def with_template(template: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_SYSTEM, r"refuses this dialogue \(System role not supported\)"),
        ("{{ messages[0].content + 1 }}", "refuses this dialogue"),  # a TypeError of Python
        ("{{ messages[0].content.parts[0] }}", "refuses this dialogue"),
        ("{% for message in messages %}", "refuses this dialogue"),
        ("{% for message in messages %}<|{{ message.role }}|>{{ message.value }}{% endfor %}", "prints the text of none of"),
    ],
)
def test_a_dialogue_that_the_template_refuses_is_named(tmp_path, template, words):
    message = rf"a\.jsonl, line 1: the base's chat template {words}.*; found 1 such rows in 1, wanted at most calibration.max_refused = 0"
    with pytest.raises(TextError, match=message):
        documents(tmp_path, SYSTEM, tokenizer=with_template(template))[0]


def test_dialogues_that_the_template_refuses_are_left_out_up_to_a_share(tmp_path):
    rows = Rows(tiny.write_lines(tmp_path / "a.jsonl", [SYSTEM, DIALOGUE, DIALOGUE, SYSTEM]))
    read = Documents(rows, with_template(NO_SYSTEM), max_refused=0.5)
    assert [len(read[index]) > 0 for index in range(4)] == [False, True, True, False]
    assert list(read.refused) == [0, 3]
    read.require_few_refused()


def test_the_share_is_of_the_dialogues_that_were_read(tmp_path):
    rows = Rows(tiny.write_lines(tmp_path / "a.jsonl", [SYSTEM, DIALOGUE, DIALOGUE, DIALOGUE]))
    read = Documents(rows, with_template(NO_SYSTEM), max_refused=0.25)
    assert read[0] == []
    with pytest.raises(TextError, match="line 1: .*System role not supported.*; found 1 such rows in 1, wanted at most .* 0.25 of"):
        read.require_few_refused()


def test_prose_is_as_the_tokenizer_has_it(tmp_path):
    tokenizer = tiny.tokenizer()
    prose = documents(tmp_path, {"text": "river stone"})
    assert prose[0] == tokenizer("river stone")["input_ids"]
    assert prose.end == tokenizer.eos_token_id


def test_an_empty_text_is_a_document_without_tokens(tmp_path):
    assert documents(tmp_path, {"text": ""})[0] == []


def test_rows_that_are_neither_prose_nor_dialogues_are_named(tmp_path):
    with pytest.raises(TextError, match=r'a\.jsonl, line 1: found goal, sol1, wanted "text" for prose or "messages" for a dialogue'):
        _ = documents(tmp_path, {"goal": "a", "sol1": "b"}).end


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"text": "a"}, DIALOGUE, 'line 2: found messages, wanted "text"'),
        (DIALOGUE, {"text": "a"}, 'line 2: found text, wanted "messages"'),
        ({"text": "a"}, {"text": None}, 'line 2, "text": found null, wanted a string'),
        (DIALOGUE, {"messages": None, "text": "a"}, 'line 2, "messages": found null, wanted a list of messages'),
    ],
)
def test_a_row_that_is_not_what_the_first_one_is_is_named(tmp_path, first, second, message):
    with pytest.raises(TextError, match=rf"a\.jsonl, {message}"):
        documents(tmp_path, first, second)[1]


def test_a_blank_row_has_no_tokens_whatever_the_tokenizer_adds(tmp_path):
    tokenizer = tiny.tokenizer()
    mark = [("<s>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=mark)
    read = documents(tmp_path, {"text": "river"}, {"text": ""}, {"text": " \n"}, tokenizer=tokenizer)
    assert read[0][0] == tokenizer.bos_token_id
    assert read[1] == read[2] == []


def test_rows_of_the_same_text_have_the_same_content(tmp_path):
    read = documents(tmp_path, {"text": "river"}, {"text": "stone"}, {"text": "river"})
    assert read.content(0) == read.content(2) != read.content(1)
