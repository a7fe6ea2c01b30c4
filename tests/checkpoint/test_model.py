import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.model import empty_model, load_model
from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import load_tokenizer
from stages.config.params import CONF
from stages.errors import CheckpointError
from tests.small_models import small
from tests.streaming.test_every_model_type import write

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


def edited(base, directory, file: str, **changes) -> Checkpoint:
    """A copy of the checkpoint with other values in one of its JSON files."""
    copy = Checkpoint(shutil.copytree(base.directory, directory))
    facts = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**facts, **changes}))
    return copy


def test_a_tensor_is_loaded_as_the_function_gives_it_and_all_others_as_they_are(base):
    dense, changed = (
        load_model(base, apply, dtype=torch.float32, device=CPU).state_dict()
        for apply in (None, lambda name, tensor: tensor * 0 if name == UP else tensor)
    )
    assert not changed[UP].any()
    assert all(torch.equal(changed[name], tensor) for name, tensor in dense.items() if name != UP)
    assert torch.equal(dense[UP], base.tensor(UP).float())


def test_loading_a_model_needs_none_of_the_deltas_code():
    code = "import sys, stages.checkpoint.model; sys.exit('stages.checkpoint.delta' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, timeout=120).returncode == 0


def test_code_of_a_checkpoint_is_not_run(base, tmp_path):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    copy = edited(base, tmp_path / "copy", "config.json", auto_map=auto_map)
    facts = json.loads((copy.directory / "tokenizer_config.json").read_text())
    (copy.directory / "tokenizer_config.json").write_text(json.dumps({**facts, "auto_map": auto_map}))
    (copy.directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load_model(copy, None, dtype=torch.float32, device=CPU)
    load_tokenizer(copy.directory)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_no_decoder_is_refused_by_its_type(base, tmp_path):
    copy = edited(base, tmp_path / "copy", "config.json", model_type="clip_vision_model")
    with pytest.raises(CheckpointError, match="transformers knows no decoder language model of type 'clip_vision_model'"):
        empty_model(copy.directory, torch.float32)


def test_the_buffers_of_a_model_without_weights_are_computed_by_the_part_that_they_belong_to(base):
    model = empty_model(base.directory, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, 1 / 10000 ** (torch.arange(0, 8, 2) / 8))


def test_two_tensors_that_the_config_ties_and_that_differ_are_refused(base, tmp_path):
    assert "lm_head.weight" in base  # of a model that ties nothing
    copy = edited(base, tmp_path / "copy", "config.json", tie_word_embeddings=True)
    found = "found other values in lm_head.weight than in model.embed_tokens.weight, which config.json ties"
    with pytest.raises(CheckpointError, match=f"{found}, wanted the same, or tie_word_embeddings false in config.json"):
        load_model(copy, None, dtype=torch.float32, device=CPU)


def test_a_parameter_that_a_models_code_makes_in_float32_stays_so(tmp_path):
    """The router of Hunyuan's mixture, in any dtype of the model, as in stock transformers."""
    checkpoint = write(tmp_path, small("hunyuan_v1_moe"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_model(checkpoint, None, dtype=torch.bfloat16, device=CPU)
    assert ours.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == {
        name: tensor.dtype for name, tensor in stock.state_dict().items()
    }


def test_a_tokenizer_that_cannot_be_loaded_is_named(base, tmp_path):
    shutil.copytree(base.directory, tmp_path / "copy")
    (tmp_path / "copy/tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="found no tokenizer that transformers can load"):
        load_tokenizer(tmp_path / "copy")
