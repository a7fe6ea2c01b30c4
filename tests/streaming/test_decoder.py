import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError
from stages.streaming import decoder as decoders
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import architectures
from tests.pruning.test_architectures import fetched

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def test_only_one_block_has_weights_at_a_time(base):
    decoder = Decoder(base, torch.float32, CPU)
    with decoder.loaded(1, decoder.read(1)):
        real = {name for name, parameter in decoder.model.named_parameters() if not parameter.is_meta}
    assert real == set(decoder.tensors(1))
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_no_weight_is_read_where_a_decoder_is_made(base, monkeypatch):
    monkeypatch.setattr(Checkpoint, "tensor", None)
    decoder = Decoder(base, torch.float32, CPU)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_a_checkpoint_whose_tensors_have_other_names_is_refused(base):
    renamed = Checkpoint(base.directory)
    renamed.shard_of = {name.replace("self_attn", "attention"): shard for name, shard in renamed.shard_of.items()}
    for shard, header in renamed.headers.items():
        renamed.headers[shard] = {name.replace("self_attn", "attention"): facts for name, facts in header.items()}
    with pytest.raises(CheckpointError, match=r"does not fit MistralForCausalLM: tensor model.layers.0.attention\S+ is not the model's$"):
        Decoder(renamed, torch.float32, CPU)


def failing(base, monkeypatch, error: BaseException):
    """Make a decoder whose model raises an error before its blocks run."""
    original = decoders.empty_model

    def fail(*_, **__):
        raise error

    def broken(*arguments):
        model = original(*arguments)
        model.get_input_embeddings().forward = fail
        return model

    monkeypatch.setattr(decoders, "empty_model", broken)
    return Decoder(base, torch.float32, CPU)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, IndexError, ValueError])
def test_no_other_error_of_a_model_is_taken_for_something_else(base, monkeypatch, kind):
    """A model's own refusal, which is a ValueError of its own statement, is among the refusals of every model type."""
    with pytest.raises(kind, match="^no memory$"):
        failing(base, monkeypatch, kind("no memory"))


def test_running_out_of_memory_before_the_blocks_is_said_as_it_is(base):
    decoder = Decoder(base, torch.float32, CPU)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    decoder.model.get_input_embeddings().forward = fail
    with pytest.raises(torch.OutOfMemoryError, match="no memory"), decoder.before_blocks():
        decoder.calls(WINDOWS)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "bloom"])  # a tensor is returned by the first one's blocks, tuples by the others'
def test_a_block_runs_alone_whether_it_returns_a_tensor_or_a_tuple(kind, tmp_path):
    decoder = Decoder(fetched(kind, tmp_path), torch.float32, CPU)
    assert torch.equal(streamed(decoder), whole(decoder))


NARROW = {**architectures.SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}  # opt-350m has such embeddings


@pytest.mark.parametrize(("kind", "config"), [("opt", NARROW), ("ctrl", {**architectures.GPT2, "dff": 48})])
def test_what_comes_before_the_blocks_has_no_part_in_the_logits(kind, config, tmp_path, monkeypatch):
    """Embeddings may be narrower than hidden states, and ctrl scales what it is given in place."""
    monkeypatch.setitem(architectures.CONFIGS, kind, config)
    decoder = Decoder(fetched(kind, tmp_path), torch.float32, CPU)
    assert torch.equal(streamed(decoder), whole(decoder))


def test_logits_leave_the_hidden_states_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.CONFIGS, "ctrl", {**architectures.GPT2, "dff": 48})
    decoder = Decoder(fetched("ctrl", tmp_path), torch.float32, CPU)
    hidden = torch.randn(1, 4, 32)
    before = hidden.clone()
    with torch.no_grad(), decoder.after_blocks():
        decoder.logits(hidden)
    assert torch.equal(hidden, before)


@torch.no_grad()
def streamed(decoder: Decoder) -> torch.Tensor:
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=2)
    for index in range(len(decoder.blocks)):
        with decoder.loaded(index, decoder.read(index)) as block:
            stream.advance(index, block)
    with decoder.after_blocks():
        return decoder.logits(stream.hidden)


@torch.no_grad()
def whole(decoder: Decoder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(decoder.checkpoint.directory, dtype=torch.float32).eval()
    return model(WINDOWS, use_cache=False).logits
