"""From the sections to a plan, and what the prune stage writes of its results."""

from dataclasses import replace

import pytest
import torch

from benchmarks import behaviour
from stages import prune
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.config.compose import read
from stages.errors import ConfigError
from stages.files import PRUNE_RESULTS, read_json, write_json
from stages.pruning.patterns import NmSection, Unstructured, UnstructuredSection
from stages.pruning.planning import plan_patterns
from stages.pruning.reconstructions import RECONSTRUCTIONS
from stages.streaming.decoder import Decoder
from tests import architectures
from tests.methods import made


@pytest.fixture()
def decoder(base) -> Decoder:
    return Decoder(base, torch.float32, torch.device("cpu"))


def test_columns_that_m_does_not_divide_name_the_matrix_before_any_weight_is_read(decoder, monkeypatch):
    monkeypatch.setattr(type(decoder.checkpoint), "tensor", None)
    with pytest.raises(
        ConfigError, match="model.layers.0.self_attn.q_proj.weight: found 32 columns, wanted a multiple of pattern.group = 3"
    ):
        plan_patterns(decoder, "row", NmSection(name="nm", kept=1, group=3, permutation_rounds=None))


def test_every_matrix_gets_the_pattern_asked_and_no_embedding_does(decoder):
    patterns = plan_patterns(decoder, "row", UnstructuredSection(name="unstructured", sparsity=0.3))
    assert len(patterns) == 21
    assert set(patterns.values()) == {Unstructured(sparsity=0.3, comparison_group="row")}
    assert all(".layers." in name for name in patterns)


def test_what_is_out_of_scope_is_named_with_its_share_of_the_blocks_weights(decoder, tmp_path):
    in_scope = sum(matrix.size for block in decoder.matrices for matrix in block)
    total = in_scope + 3 * 2 * 32  # two norms in each block
    share = 3 * 32 / total
    assert prune.out_of_scope(decoder) == {"input_layernorm": share, "post_attention_layernorm": share}
    mamba = Decoder(Checkpoint(architectures.write(tmp_path, "mamba")), torch.float32, torch.device("cpu"))
    assert {"mixer.A_log", "mixer.conv1d", "mixer.D", "norm"} <= set(prune.out_of_scope(mamba))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wanda", made("wanda")),
        ("magnitude", made("magnitude")),
        ("swaps_least_squares", made("wanda", "swaps", cycles=25, candidates=16, refit_steps=20)),
        ("dsnot", made("wanda", "dsnot", cycles=50, threshold=0.00005)),
        ("sparsegpt", made("obs", "sparsegpt", comparison_group="matrix", block_size=128)),
        ("wanda_sparsegpt", made("wanda", "sparsegpt", block_size=128)),
    ],
)
def test_a_method_is_what_its_file_says(name, expected):
    assert compose.method(name) == replace(expected, name=name)


def test_a_reconstruction_trains_each_block_the_last_ones_together_or_none():
    def trained(name: str) -> tuple[bool, bool]:
        section = read(f"reconstruction={name}")["reconstruction"]
        entry = RECONSTRUCTIONS[name]
        each_block = entry.each_block(section) if entry.each_block else None
        last_blocks = entry.last_blocks(section, 4) if entry.last_blocks else None
        assert entry.trains == (each_block is not None or last_blocks is not None)
        return each_block is not None, last_blocks is not None

    assert {name: trained(name) for name in RECONSTRUCTIONS} == {
        "none": (False, False),
        "block": (True, False),
        "distilled": (True, True),
    }


def test_a_distillation_takes_its_share_of_the_blocks_and_one_at_least():
    section, entry = read("reconstruction=distilled")["reconstruction"], RECONSTRUCTIONS["distilled"]

    def first(share: float, blocks: int) -> int:
        return entry.last_blocks(replace(section, share=share), blocks).first

    assert (first(0.5, 30), first(1.0, 30), first(0.4, 32), first(0.01, 30)) == (15, 0, 19, 29)
    assert entry.each_block(replace(section, block_epochs=0)) is None


def test_layers_of_one_name_at_two_places_of_a_block_are_two_lines_in_the_plot():
    """GPT-2 has a c_proj in its attention and another in its MLP."""
    names = [f"transformer.h.{block}.{layer}.weight" for block in (0, 1) for layer in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    rows = [{"block": number // 3, "matrix": name, "relative_error": float(number)} for number, name in enumerate(names)]
    assert prune.error_by_block(rows) == [
        {"block": 0, "relative_error": 0.0, "matrix": "attn.c_proj"},
        {"block": 0, "relative_error": 1.0, "matrix": "mlp.c_proj"},
        {"block": 0, "relative_error": 2.0, "matrix": "c_fc"},
        {"block": 1, "relative_error": 3.0, "matrix": "attn.c_proj"},
        {"block": 1, "relative_error": 4.0, "matrix": "mlp.c_proj"},
        {"block": 1, "relative_error": 5.0, "matrix": "c_fc"},
    ]


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
        (["method=sparsegpt"], "sparsegpt (obs + sparsegpt, per matrix)"),
        (["method=sparsegpt", "pattern=nm_2_4"], "sparsegpt (obs + sparsegpt)"),
        (["method=sparsegpt", "method/score=ria", "allocation=owl"], "sparsegpt (ria + sparsegpt, per matrix), owl allocation"),
        (["method/update=swaps"], "wanda (wanda + swaps, per row)"),
        (["method=swaps", "method/update=none"], "swaps (wanda, per row)"),
        (["method=wanda_variant", "method/score=wanda"], "wanda_variant (wanda, per matrix)"),
        (["prune=one_pass"], "wanda, one pass"),
        (["prune=sequential"], "wanda, sequential"),
        (["reconstruction=block"], "wanda, reconstructed"),
        (["reconstruction=distilled"], "wanda, distilled"),
    ],
)
def test_the_label_tells_models_apart_in_a_plot(overrides, expected):
    sections = read(*overrides)
    parts = (sections[name] for name in ("method", "pattern", "allocation", "reconstruction", "prune"))
    assert prune.label(*parts) == expected


def test_experts_are_loaded_one_at_a_time_where_the_budget_does_not_hold_the_block(tmp_path, caplog):
    def budgeted(bytes_asked: float, *overrides: str) -> tuple[Decoder, int]:
        mixture = Decoder(Checkpoint(directory), torch.float32, torch.device("cpu"))
        chosen = read(*overrides)
        plan = prune.plan_of(mixture, chosen["method"], chosen["pattern"], chosen["allocation"], chosen["reconstruction"], chosen["prune"])
        return mixture, prune.host_budget(mixture, plan, chosen["allocation"], bytes_asked / 2**30, 100)

    directory = architectures.write(tmp_path, "mixtral")
    whole, left = budgeted(2**31)
    assert not whole.apart
    needed = 2**31 - left
    assert not budgeted(needed)[0].apart
    apart, left = budgeted(needed - 1)
    assert len(apart.apart) == 3
    assert left > 0
    assert not caplog.records
    for overrides, option in ((["allocation=owl"], "allocation=owl"), (["reconstruction=block"], "a reconstruction")):
        assert not budgeted(1, *overrides)[0].apart
        assert f"with {option} experts are not loaded one at a time" in caplog.messages[-1]


@pytest.mark.parametrize(("faster", "taken"), [(1, True), (1e6, False)])
def test_the_log_and_sparsity_json_say_which_blocks_learning_changed(faster, taken, caplog):
    rates = (f"reconstruction.learning_rate={0.0025 * faster}", f"reconstruction.block_learning_rate={0.01 * faster}")
    with behaviour.project(), caplog.at_level("INFO"):
        options = ("method=sparsegpt", "reconstruction=distilled", "reconstruction.share=0.3", *rates)
        behaviour.run_prune(read(*options, "prune.device=cpu", "prune.dtype=float32"))
        rows = read_json(PRUNE_RESULTS / "sparsity.json")
    told = {(row["block"], row["trained"], row["distilled"]) for row in rows}
    assert told == {(0, taken, None), (1, taken, None), (2, None, taken)}
    kept = ["no learning rate lowered its error", "the last blocks are not distilled"]
    assert [any(words in message for message in caplog.messages) for words in kept] == [not taken, not taken]
    assert any(", 0." in message and message.endswith("s") and "on windows held out, " in message for message in caplog.messages)


@pytest.mark.parametrize(("method", "warned"), [("sparsegpt", True), ("wanda", False)])
def test_windows_that_are_few_for_the_inputs_of_a_layer_are_said_where_weights_are_fitted_to_them(method, warned, caplog):
    with behaviour.project():  # 32 windows of 64 tokens, and layers of up to 192 inputs: 20 tokens for each are 60 windows
        behaviour.run_prune(read(f"method={method}", "prune.device=cpu", "prune.dtype=float32"))
    assert any("calibration.windows=60 gives as many" in message for message in caplog.messages) == warned


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mixtral", ", though experts are loaded one at a time"),
        ("jetmoe", ": only experts with transformers' own interface are loaded one at a time"),
        ("mistral", ""),
    ],
)
def test_the_log_warns_with_figures_where_the_budget_does_not_hold_what_is_needed_even_so(kind, why, tmp_path, caplog):
    decoder = Decoder(Checkpoint(architectures.write(tmp_path, kind)), torch.float32, torch.device("cpu"))
    chosen = read()
    plan = prune.plan_of(decoder, chosen["method"], chosen["pattern"], chosen["allocation"], chosen["reconstruction"], chosen["prune"])
    assert prune.host_budget(decoder, plan, chosen["allocation"], 0.1, 100) == 0
    needed = prune.needed_bytes(decoder, plan, chosen["allocation"], 100) / 1e9
    assert caplog.messages == [f"pruning needs up to {needed:.1f} GB of host memory, of which 0.1 GB are there{why}"]
