"""Every model type that is pruned, streamed, against the plain whole-model reference of test_architectures.

The sample runs always, besides the types that test_architectures has; all run with EVERY_MODEL_TYPE=1 (`make census`).
"""

import os

import pytest
import torch
from transformers import AutoConfig

from stages.checkpoint.model_class import auto_class_of
from stages.release.packing import pack
from stages.release.verification import verify
from tests import tiny
from tests.architectures import CONFIGS
from tests.pruning.test_architectures import HALF, WANDA, WINDOWS, mask_of, plain_wanda, streamed, written
from tests.small_models import small
from tests.streaming.test_every_model_type import BUILT, REASONS, write

SAMPLE = """afmoe bailing_hybrid cohere_compass_text dbrx deepseek_v2 deepseek_v4 diffllama doge dots1 dots3_note
    ernie4_5_moe fuyu git inkling_text kimi_linear lfm2 longcat_flash minimax nanochat nemotron_h olmo_hybrid qwen4_exp xlstm zamba zaya"""
PRUNED = [kind for kind in BUILT if kind not in REASONS]
RUN = PRUNED if os.environ.get("EVERY_MODEL_TYPE") else [kind for kind in PRUNED if kind in SAMPLE.split() and kind not in CONFIGS]


@pytest.mark.filterwarnings("default")  # of models at their small sizes
@pytest.mark.parametrize("kind", RUN)
def test_the_masks_are_those_of_the_whole_model_and_the_release_is_sound(kind, tmp_path):
    checkpoint = tiny.fetched(write(tmp_path / "stored", small(kind)).directory, tmp_path)
    decoder, blocks = streamed(checkpoint, WANDA, HALF)
    _, masks = plain_wanda(decoder, 0.5, auto_class_of(AutoConfig.from_pretrained(checkpoint.directory)))
    changes = {name: change for block in blocks for name, change in block.changes.items()}
    results = [result for block in blocks for result in block.matrices]
    assert {result.matrix.name for result in results} == masks.keys()
    for result in results:
        mask = mask_of(changes, result.matrix)
        assert ((~mask).sum(dim=1) == mask.shape[1] // 2).all(), result.matrix.name
        if result.tokens:  # an expert that no token chose is pruned for what the others read
            assert torch.equal(mask, masks[result.matrix.name]), result.matrix.name
    assert sum(bool(result.tokens) for result in results) >= 0.5 * len(results)
    delta = written(tmp_path / "sparse", checkpoint, blocks)
    (tmp_path / "release").mkdir()
    pack(checkpoint, delta, tmp_path / "release")
    verified = verify(tmp_path / "release", checkpoint, delta)  # every other tensor bit by bit, and stock transformers' logits
    assert verified.matrices == len(results)
    assert verified.sparsity == pytest.approx(0.5, abs=0.001)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["deepseek_v4", "hy_v4"])
def test_a_weight_that_its_module_casts_is_pruned_for_what_it_reads_in_bfloat16_too(kind, tmp_path):
    checkpoint = write(tmp_path, small(kind))
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        _, blocks = streamed(checkpoint, WANDA, HALF, dtype=dtype)
        mixing = [result for result in blocks[0].matrices if result.matrix.name.endswith("fn")]
        assert len(mixing) == 2  # of attention and of the MLP, which read all streams
        assert all(result.tokens == WINDOWS.numel() for result in mixing)
        masks.append(torch.cat([mask_of(blocks[0].changes, result.matrix).flatten() for result in mixing]))
    assert masks[0].float().mean() == 0.5
    assert (masks[0] == masks[1]).float().mean() > 0.95


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["longcat_flash", "mixtral"])
def test_an_expert_that_too_few_tokens_chose_is_calibrated_on_all_that_reached_its_mixture(kind, tmp_path):
    _, blocks = streamed(write(tmp_path, small(kind)), WANDA, HALF, expert_tokens=10**6)
    for block in blocks:
        experts = [result for result in block.matrices if result.matrix.parameter_slice.expert is not None]
        reading = [result for result in experts if result.matrix.parameter_slice.name.endswith("gate_up_proj")]
        assert {result.calibrated_on for result in experts} == {"all tokens"}
        assert len({result.relative_error for result in reading}) == len(reading) > 0  # of other weights, on the same tokens


def test_the_sample_has_types_that_are_pruned_and_have_no_test_elsewhere():
    assert set(SAMPLE.split()) <= set(PRUNED) - CONFIGS.keys()
