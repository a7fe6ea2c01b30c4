from dataclasses import replace

import pytest
import torch

from stages import composition, config, prune
from stages.errors import ConfigError
from stages.files import write_json
from stages.pruning.method import DsNoT, SparseGpt, SwapAndRefit
from stages.pruning.patterns import Unstructured
from stages.streaming.decoder import Decoder
from tests.methods import MAGNITUDE, WANDA
from tests.test_config import composed


def configured(method: str) -> config.Method:
    """A preset of conf/method."""
    return config.read(composed(f"method={method}", "method.comparison_group=matrix"))["method"]


@pytest.fixture()
def decoder(base) -> Decoder:
    return Decoder(base, torch.float32, torch.device("cpu"))


def test_columns_that_m_does_not_divide_name_the_matrix_before_any_weight_is_read(decoder, monkeypatch):
    monkeypatch.setattr(type(decoder.checkpoint), "tensor", None)
    with pytest.raises(
        ConfigError, match="model.layers.0.self_attn.q_proj.weight: found 32 columns, wanted a multiple of pattern.group = 3"
    ):
        composition.plan_patterns(decoder, "row", config.Nm(name="nm", kept=1, group=3, permutation_rounds=None))


def test_every_matrix_gets_the_pattern_asked_and_no_embedding_does(decoder):
    patterns = composition.plan_patterns(decoder, "row", config.Unstructured(name="unstructured", sparsity=0.3))
    assert len(patterns) == 21
    assert set(patterns.values()) == {Unstructured(sparsity=0.3, comparison_group="row")}
    assert all(".layers." in name for name in patterns)


def test_a_methods_composition_is_what_its_configuration_says():
    assert composition.compose(configured("wanda")) == WANDA
    assert composition.compose(configured("magnitude")) == MAGNITUDE
    assert composition.compose(configured("swaps_least_squares")).update == SwapAndRefit(
        damping=0.01, cycles=25, candidates=16, refit_steps=20
    )
    assert composition.compose(configured("dsnot")).update == DsNoT(cycles=50, comparison_group=0.00005)


@pytest.mark.parametrize(("name", "expected"), [("none", None), ("block", True), ("sub_block", False), ("distilled", True)])
def test_a_reconstruction_is_toward_what_its_name_says(name, expected):
    found = composition.reconstruction_of(config.read(composed(f"reconstruction={name}"))["reconstruction"])
    assert (found and found.toward_model) is expected


def test_a_distillation_takes_its_share_of_the_blocks_and_one_at_least():
    def first(share: float, blocks: int) -> int:
        return composition.distillation_of(replace(distilled, share=share), blocks).first

    distilled = config.read(composed("reconstruction=distilled"))["reconstruction"]
    assert composition.distillation_of(config.read(composed())["reconstruction"], 30) is None
    assert (first(0.5, 30), first(1.0, 30), first(0.4, 32), first(0.01, 30)) == (15, 0, 19, 29)
    assert composition.reconstruction_of(replace(distilled, block_epochs=0)) is None


@pytest.mark.parametrize(("name", "sweeping"), [("sparsegpt", True), ("wanda_sparsegpt", False)])
def test_sparsegpt_chooses_while_sweeping_by_its_own_score_alone(name, sweeping):
    update = composition.compose(configured(name)).update
    assert update == SparseGpt(damping=0.01, damping_limit=1.0, block_size=128, choose_while_sweeping=sweeping)


def test_experts_are_one_line_in_the_plot_of_errors():
    rows = [{"block": 0, "matrix": f"layers.0.experts.{e}.w1.weight", "relative_error": e} for e in range(3)]
    rows += [{"block": 0, "matrix": "layers.0.experts.down_proj[0]", "relative_error": 4.0}]
    assert prune.error_by_block(rows) == [
        {"block": 0, "relative_error": 1.0, "matrix": "w1"},
        {"block": 0, "relative_error": 4.0, "matrix": "down_proj"},
    ]


def test_memory_is_what_is_asked_or_what_is_free():
    assert prune.memory_budget(1.5) == 1610612736
    assert prune.memory_budget(None) > 0


@pytest.mark.parametrize(
    ("config_json", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"n_head": 8}, None),
    ],
)
def test_the_context_length_is_found_under_the_names_that_configs_use(base, tmp_path, config_json, length):
    base.directory = tmp_path
    write_json(tmp_path / "config.json", config_json)
    assert base.context_length == length


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "wanda"),
        (["method=sparsegpt"], "sparsegpt (obs)"),
        (["method=sparsegpt", "method/score=ria", "allocation=owl"], "sparsegpt (ria), owl allocation"),
        (["method/update=swaps"], "wanda, swaps"),
        (["method=swaps"], "swaps (wanda)"),
        (["method=swaps", "method/update=none"], "swaps (wanda), no update"),
        (["method=wanda_variant", "method/score=wanda"], "wanda_variant (wanda)"),
        (["method=wanda_sparsegpt"], "wanda_sparsegpt"),
        (["method=wanda_sparsegpt", "method/update=none"], "wanda_sparsegpt, no update"),
        (["method=magnitude_per_matrix"], "magnitude_per_matrix"),
        (["prune=one_pass"], "wanda, one pass"),
        (["reconstruction=block"], "wanda, reconstructed"),
        (["reconstruction=distilled"], "wanda, distilled"),
        (["reconstruction=sub_block", "prune=by_parts"], "wanda, sub_block reconstruction, by parts"),
        (["reconstruction=sub_block"], "wanda, sub_block reconstruction"),
    ],
)
def test_the_label_tells_models_apart_in_a_plot(overrides, expected):
    sections = config.read(composed(*overrides))
    assert composition.label(*(sections[name] for name in ("method", "allocation", "reconstruction", "prune"))) == expected
