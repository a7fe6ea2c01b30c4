"""Text decoders of multimodal checkpoints, against a plain whole-model reference; what else they hold stays as it was, and works."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from stages import prune
from stages.checkpoint.model import load_model
from stages.checkpoint.model_class import auto_class_of
from stages.checkpoint.reader import INDEX, Checkpoint
from stages.config import compose
from stages.files import write_json
from stages.pruning.allocations import loss
from stages.pruning.entries import DenseModel
from stages.release.packing import pack
from stages.release.verification import verify
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import multimodal, tiny
from tests.methods import WANDA, sparsegpt
from tests.pruning.test_architectures import BATCH, CPU, HALF, WINDOWS, mask_of, plain_wanda, streamed, written

KINDS = ["gemma3", "gemma4", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"]
TOKENS = WINDOWS % multimodal.PLACEHOLDER  # without those that stand for images
NOTHING = 0  # bytes of free memory


def fetched(kind: str, directory) -> Checkpoint:
    """A checkpoint of this type as the fetch stage writes it."""
    return tiny.fetched(multimodal.write(directory / "source", kind), directory)


@pytest.mark.filterwarnings("default")  # of models at their small sizes
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_the_text_decoder_is_pruned_as_in_the_whole_model_and_the_release_sees_images_as_before(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.pruning.test_architectures.WINDOWS", TOKENS)
    base = fetched(kind, tmp_path)
    decoder, blocks = streamed(base, WANDA, HALF, windows=TOKENS)
    auto_class = auto_class_of(AutoConfig.from_pretrained(base.directory))
    reference, masks = plain_wanda(decoder, 0.5, auto_class)
    changes = {name: change for block in blocks for name, change in block.changes.items()}
    matrices = [matrix for block in decoder.matrices for matrix in block]
    assert {matrix.name for matrix in matrices} == set(masks)
    for matrix in matrices:
        assert torch.equal(mask_of(changes, matrix), masks[matrix.name]), matrix.name
    pruned = {f"{decoder.prefix}.{index}.{matrix.layer.module}" for index, block in enumerate(decoder.matrices) for matrix in block}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in pruned:
            assert not name.startswith(f"{decoder.prefix}.") or re.search(r"mlp\.gate$|router", name), name

    delta = written(tmp_path / "sparse", base, blocks)
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    for free in (None, NOTHING):
        verified = verify(tmp_path / "release", base, delta, free)  # every other tensor bit by bit, and stock transformers' logits
    assert verified.loaded.model_class == base.config["architectures"][0] == multimodal.model_class(kind).__name__
    assert any("vis" in part for part in verified.loaded.joined)
    assert not any(f"{decoder.prefix}.".startswith(f"{part}.") for part in verified.loaded.joined)

    release = auto_class.from_pretrained(tmp_path / "release", dtype=torch.float32).eval().requires_grad_(False)
    ours = load_model(base, delta.apply, dtype=torch.float32, device=CPU)
    for model in (release, ours):
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
    seen = multimodal.pixels(kind)
    expected = reference(**seen, use_cache=False).logits
    assert torch.equal(release(**seen, use_cache=False).logits, expected)
    assert torch.equal(ours(**seen, use_cache=False).logits, expected)
    other = {**seen, "pixel_values": -seen["pixel_values"]}
    assert not torch.equal(reference(**other, use_cache=False).logits, expected)  # it looks at the image
    assert torch.equal(release(input_ids=TOKENS, use_cache=False).logits, reference(input_ids=TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_weights_of_encoders_are_never_read_to_prune(kind, tmp_path, monkeypatch):
    base, read = fetched(kind, tmp_path), []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name, **options: (read.append(name), tensor(self, name, **options))[1])
    decoder, _ = streamed(base, WANDA, HALF, windows=TOKENS)
    with decoder.after_blocks():
        pass
    encoder = [name for name in base if "vision_tower" in name or "visual" in name]
    assert len(encoder) > 10
    assert not set(encoder) & set(read)
    assert set(base) - set(encoder) - {name for name in base if "projector" in name} <= set(read)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_an_encoder_that_runs_after_all_is_no_encoder_of_zeros(tmp_path):
    """Weights that are not loaded are NaN, not zeros, in case that a model uses them where it did not before."""
    decoder = Decoder(fetched("gemma3", tmp_path), torch.float32, CPU)
    with decoder.before_blocks():
        assert decoder.model.model.vision_tower.embeddings.patch_embedding.weight.isnan().all()
        assert decoder.model.device == CPU


def test_methods_allocations_and_training_take_a_text_decoder_as_any_other(tmp_path):
    base = fetched("gemma3", tmp_path)
    chosen = compose.read("method=sparsegpt", "reconstruction=distilled", "allocation=loss")
    decoder = Decoder(base, torch.float32, CPU)

    def stream(windows: torch.Tensor, **options: int) -> Stream:
        with decoder.before_blocks():
            return Stream(decoder, windows, batch=BATCH, **options)

    dense = DenseModel(decoder=decoder, windows=TOKENS, stream=stream, comparison_group="row")
    assert loss.evidence(dense, chosen["allocation"])
    _, swept = streamed(base, sparsegpt(), HALF, windows=TOKENS)
    _, cut = streamed(base, WANDA, HALF, windows=TOKENS)
    errors = [{one.matrix.name: one.relative_error for one in blocks[0].matrices} for blocks in (swept, cut)]
    assert sum(errors[0].values()) < sum(errors[1].values())
    assert prune.plan_of(decoder, WANDA, chosen["pattern"], chosen["allocation"], chosen["reconstruction"], chosen["prune"])


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_names_of_published_checkpoints_are_those_that_transformers_renames(kind, tmp_path):
    """As google/gemma-3-4b-it and llava-hf/llava-1.5-7b-hf have them."""
    base = Checkpoint(multimodal.write(tmp_path, kind))
    old = re.compile("^vision_tower[.]")
    assert any(map(old.match, base))
    for shard in base.headers:
        tensors = load_file(tmp_path / shard)
        save_file({old.sub("vision_tower.vision_model.", name): one for name, one in tensors.items()}, tmp_path / shard, {"format": "pt"})
    table = {old.sub("vision_tower.vision_model.", name): shard for name, shard in base.shard_of.items()}
    write_json(tmp_path / INDEX, {"metadata": {}, "weight_map": table})
    published = Checkpoint(tmp_path)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in published
    assert all(Decoder(published, torch.float32, CPU).matrices)
    stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    ours = load_model(published, None, dtype=torch.float32, device=CPU).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.state_dict().items())
