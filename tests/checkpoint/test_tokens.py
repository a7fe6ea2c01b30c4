import json
import shutil

import pytest

from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import embedding_rows, rendered, require_embedded, require_requests
from stages.errors import CheckpointError, TextError
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
