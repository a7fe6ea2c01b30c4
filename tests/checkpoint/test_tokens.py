import json
import shutil

import pytest
from tokenizers import processors

from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import embedding_rows, prompt_ids, rendered, require_embedded, require_requests
from stages.errors import CheckpointError, TextError
from stages.evaluation.encoding import Encoder
from tests import tiny

HELLO = [{"role": "user", "content": "river"}]


def test_the_rows_of_the_embedding_are_those_of_its_tensor(base):
    assert embedding_rows(base) == 400


def test_a_config_with_fewer_rows_counts(base, tmp_path):
    shutil.copytree(base.directory, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "vocab_size": 399}))
    assert embedding_rows(Checkpoint(tmp_path / "base")) == 399


def test_a_token_beyond_the_embedding_is_named():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    last = len(tokenizer) - 1
    require_embedded([0, last], last + 1, tokenizer, "a")
    require_embedded([last], None, tokenizer, "a")
    require_embedded([], 1, tokenizer, "a")
    with pytest.raises(CheckpointError, match=rf"^a: found the token '<new>' with id {last}, wanted ids below {last}, the rows of"):
        require_embedded([0, last], last, tokenizer, "a")
    with pytest.raises(CheckpointError, match=rf"^evaluation.tasks: found the token '<new>' with id {last}"):
        require_requests([(("a", "b"), [0], [1]), (("a", "b"), [0], [last])], last, tokenizer)


def test_a_dialogue_is_rendered_by_the_template():
    assert rendered(tiny.tokenizer(), HELLO, add_generation_prompt=True) == "<|user|>\nriver</s>\n<|assistant|>\n"


def test_templates_of_which_none_is_the_default_are_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"tool_use": tiny.CHAT_TEMPLATE}
    with pytest.raises(TextError, match="the base's chat template refuses this dialogue"):
        rendered(tokenizer, HELLO)


def with_end(tokenizer):
    """As saved with add_eos_token for training."""
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ends)
    return tokenizer


def test_nothing_that_a_tokenizer_appends_stands_at_the_end_of_a_prompt():
    plain, ended = tiny.tokenizer(), with_end(tiny.tokenizer())
    assert ended.encode("river stone")[-1] == ended.eos_token_id
    for text in ("river stone", "a", "</s>", "a</s>"):
        assert prompt_ids(plain, text) == plain.encode(text)
        assert prompt_ids(ended, text) == [ended.bos_token_id, *plain.encode(text)]


def test_answers_of_a_tokenizer_that_appends_are_told_apart():
    encoder = Encoder(with_end(tiny.tokenizer()), tiny.NO_BOS, 64)
    (context, first), (again, second) = (encoder._encode_pair("river stone", answer) for answer in (" lamp", " winter"))
    assert context == again
    assert first != second
    assert tiny.tokenizer().decode(first) == " lamp"


def test_it_is_always_the_same_day_to_a_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert rendered(tokenizer, HELLO) == "26 Jul 2024 river"
