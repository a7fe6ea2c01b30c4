"""The benchmarks' own parts: what they measure with, what they write, and that the GPU script runs where little is installed."""

import ast
import dataclasses
import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralForCausalLM

from benchmarks import (
    arguments,
    behaviour,
    census,
    contenders,
    disk,
    evaluation_seconds,
    float8_scores,
    frontier,
    gpu,
    llama_cpp_divergence,
    on_gpu,
    orders,
    quality,
    random_checkpoint,
    rescale,
    table,
)
from benchmarks.markers import write_between
from benchmarks.measure import measure
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.evaluation.measurement import Difference, Kind, Measurement, as_rows
from stages.evaluation.metric import Corpus
from stages.evaluation.metrics import METRICS
from stages.files import FLOAT8_RESULTS, read_json, write_json
from stages.prune import code_sha256
from stages.streaming.decoder import Decoder
from tests.dependencies import closure
from tests.project import ROOT

KNOWN = behaviour.load()
SMOLLM2, GEMMA3 = contenders.MODELS
POINTS = contenders.points(SMOLLM2)


def test_text_goes_between_its_markers_and_nowhere_else(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    write_between(document, "<!-- x -->", "<!-- end of x -->", "new")
    assert document.read_text() == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found 0 times <!-- x -->"),
        ("<!-- x --><!-- x --> <!-- end -->", "found 2 times <!-- x -->"),
        ("<!-- end --><!-- x -->", "before"),
    ],
)
def test_markers_that_are_not_there_once_are_named(tmp_path, content, message):
    document = tmp_path / "page.md"
    document.write_text(content)
    with pytest.raises(ValueError, match=message):
        write_between(document, "<!-- x -->", "<!-- end -->", "new")


def test_every_benchmark_reads_its_command_line_before_it_begins():
    read = ("arguments.none(__doc__)", "ArgumentParser(")
    scripts = [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    scripts = [script for script in scripts if 'if __name__ == "__main__"' in script and "\ndef main(" in script]
    assert len(scripts) > 20
    assert all(any(call in script for call in read) for script in scripts)


def test_a_benchmark_without_options_answers_help_and_refuses_others(monkeypatch, capsys):
    for given, status, words in ((["--help"], 0, "Measure a thing."), (["--rows", "3"], 2, "--rows")):
        monkeypatch.setattr(sys, "argv", ["benchmark", *given])
        with pytest.raises(SystemExit) as ended:
            arguments.none("Measure a thing.\n\nMore of it.")
        assert ended.value.code == status
        assert words in "".join(capsys.readouterr())


def test_memory_that_no_file_backs_is_seen():
    cost = measure([sys.executable, "-c", "import time; data = bytearray(b'x') * 100_000_000; time.sleep(0.3)"])
    assert cost.exit_code == 0
    assert 100e6 < cost.peak_anonymous < 150e6
    assert cost.peak_resident >= cost.peak_anonymous


def test_a_command_that_fails_says_how():
    assert measure([sys.executable, "-c", "raise SystemExit(3)"]).exit_code == 3


def test_the_random_checkpoint_is_a_zephyr_that_the_engine_takes(tmp_path, monkeypatch):
    small = random_checkpoint.zephyr(2)
    small.update({"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1})
    monkeypatch.setattr(random_checkpoint, "zephyr", lambda _: small)
    assert len(random_checkpoint.write(tmp_path, 2)) == 3
    assert sum(map(len, Decoder(Checkpoint(tmp_path), torch.float32, torch.device("cpu")).matrices)) == 14


def test_zephyr_has_seven_thousand_million_weights():
    with torch.device("meta"):
        assert MistralForCausalLM(random_checkpoint.zephyr(32)).num_parameters() == 7_241_732_096


def test_the_gpu_benchmark_imports_torch_transformers_and_safetensors_alone():
    files = closure(ROOT / "benchmarks/gpu.py") | {
        ROOT / f"benchmarks/{name}.py" for name in ("gpu_paths", "random_checkpoint", "markers", "peers/plain")
    }
    roots = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
    assert roots - set(sys.stdlib_module_names) <= {
        "torch",
        "transformers",
        "triton",
        "safetensors",
        "numpy",
        "stages",
        "benchmarks",
    }  # triton comes with torch


def test_the_gpu_benchmarks_correctness_part_passes_on_the_cpu(capsys):
    gpu.check(torch.device("cpu"))
    assert "of the mask bits are those of the published procedure" in capsys.readouterr().out


def test_without_a_gpu_the_benchmark_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=Path(ROOT), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stderr


def test_every_point_of_the_leaderboard_is_a_valid_experiment_and_no_two_are_the_same():
    points = [point for model in contenders.MODELS for point in contenders.points(model)]
    assert len({point.command for point in points}) == len(points)
    for point in {(point.base, point.cell): point for point in points if not point.seed}.values():
        assert read(*point.arguments)
    for base in {point.base for point in points}:
        sections = read(*next(point for point in points if point.base == base and point.seed).arguments)
        assert sections["calibration"].seed == 1
        assert sections["base"] == read(f"base={base}")["base"]
    assert tuple(read("evaluation=perplexity")["evaluation"].corpora) == contenders.TEXTS


@pytest.mark.parametrize("model", contenders.MODELS, ids=lambda model: model.base)
def test_first_seeds_are_measured_before_others_and_what_the_comparison_stands_on_before_the_rest(model):
    points = quality.due({}, model)
    leads = {point for c in model.contenders for point in points if point.contender == c.name and point.pattern in c.leads}
    assert {point.contender for point in leads} == {
        "SparseGPT",
        "short ADMM, loss allocation, distilled",
        "short ADMM, loss allocation, distilled in two passes",
        "short ADMM, permuted, distilled in two passes",
    }
    first = [point for point in points if not point.seed]
    assert points[: len(first)] == first
    for of_seed in (first, [point for point in points if point.seed]):
        count = len(leads & set(of_seed))
        assert set(of_seed[:count]) == leads & set(of_seed)


def test_a_model_competes_under_names_that_exist_and_its_table_holds_no_other():
    for model in contenders.MODELS:
        assert sorted(contender.name for contender in model.contenders) == sorted(model.names)


@pytest.mark.parametrize("pattern", list(contenders.PATTERNS))
def test_the_best_preset_is_the_row_that_the_comparison_stands_on(pattern):
    name = "best_" + pattern.strip("%").replace(":", "_")
    (best,) = [one for one in contenders.CONTENDERS if pattern in one.leads and one.name != "SparseGPT"]
    preset = read(f"experiment={name}")
    row = read(contenders.PATTERNS[pattern], *best.overrides.split())
    parts = ("method", "pattern", "allocation", "reconstruction", "prune", "calibration")
    assert [preset[part] for part in parts] == [row[part] for part in parts]


def row(point: contenders.Point, perplexity: float) -> dict:
    measured = {"relative_error": 0.1, "seconds": 5, "peak_memory_gib": 0.5, "device": "a CPU", "behaviour": KNOWN[point.cell]}
    return {**vars(point), **measured, "texts": {"wikipedia": on_text("wikipedia", perplexity)}}


def on_text(corpus: str, perplexity: float, dense: float = 10.0) -> dict:
    protocol = {"tokens": 100, "corpus": corpus, "window_length": 10}
    return {"perplexity": perplexity, "dense_perplexity": dense, "protocol": protocol}


def test_the_leaderboard_gives_means_and_spreads_over_seeds_and_says_what_is_missing():
    points = [point for point in POINTS if point.contender in ("Wanda", "SparseGPT") and point.pattern == "50%"]
    rows = {point: row(point, 40.0 + point.seed if point.contender == "Wanda" else 30.0) for point in points}
    for point in points:
        if point.contender == "Wanda" and point.seed:
            rows[point]["behaviour"] = {"error": 1.0}
    text = quality.table(rows, SMOLLM2)
    wanda, sparsegpt = (next(line for line in text.splitlines() if line.startswith(f"| {name} |")) for name in ("Wanda", "SparseGPT"))
    assert "| 41.00 ± 1.00 † |" in wanda
    assert "| **30.00 ± 0.00** |" in sparsegpt
    assert f" {len(quality.missing(rows, SMOLLM2))} of {len(quality.due({}, SMOLLM2))} points are not measured yet" in text
    assert "†: includes points (2 in all) measured before a change of the code" in text
    full = quality.full_table(rows)
    assert (
        "| 41.00 ± 1.00 † | 40.00, 41.00, 42.00 | 4.10 | 1.55 | 1.28 | 0.1000 | 5 (1.0) | 0.50 GiB |" in full
    )  # (41 - 10) / (30 - 10), ln 4.1 / ln 3


def test_the_best_four_at_a_pattern_are_due_with_every_seed_once_every_first_seed_is_measured():
    first = [point for point in quality.due({}, SMOLLM2) if point.pattern == "2:4" and point.seed == 0]
    rows = {point: row(point, 100.0 - place) for place, point in enumerate(first)}
    assert quality.due(dict(list(rows.items())[1:]), SMOLLM2) == quality.due({}, SMOLLM2)
    more = set(quality.due(rows, SMOLLM2)) - set(quality.due({}, SMOLLM2))
    best = {point.contender for point in first[-4:]}
    assert best.isdisjoint({"Wanda", "SparseGPT", "short ADMM, permuted, distilled in two passes"})
    assert {(point.contender, point.pattern, point.seed) for point in more} == {(name, "2:4", seed) for name in best for seed in (1, 2)}


def test_a_point_is_wanted_where_it_is_missing_and_again_where_it_is_stale():
    known, other = (point for point in POINTS if point.cell == POINTS[0].cell and point.seed < 2)
    fresh, old = row(known, 30.0), row(other, 30.0) | {"behaviour": {"error": 1.0}}
    for measured in (fresh, old):
        measured["texts"]["wikipedia_long"] = on_text("wikipedia_long", 20.0)
    wanted = quality.wanted({known: fresh, other: old}, [SMOLLM2], ["50%"], True)
    assert known not in wanted and other in wanted
    assert other not in quality.wanted({known: fresh, other: old}, [SMOLLM2], ["50%"], False)
    assert {point.pattern for point in wanted} == {"50%"}
    assert not [point for point in quality.wanted({}, [SMOLLM2], ["50%"], True) if point not in quality.due({}, SMOLLM2)]


def test_points_with_every_seed_are_missing_until_every_text_is_measured_and_others_stay_as_they_are():
    repeated, single = (next(point for point in POINTS if point.contender == name) for name in ("SparseGPT", "RIA"))
    rows = {repeated: row(repeated, 30.0), single: row(single, 30.0)}
    assert repeated in quality.missing(rows, SMOLLM2) and single not in quality.missing(rows, SMOLLM2)
    rows[repeated]["texts"]["wikipedia_long"] = on_text("wikipedia_long", 20.0)
    assert repeated not in quality.missing(rows, SMOLLM2)


def test_where_no_seed_is_common_on_a_text_nothing_is_compared_there():
    rows = measured_rows({("SparseGPT", 0): 30.0, ("SparseGPT", 1): 30.0, ("ADMM", 0): 20.0})
    by_key = {(point.contender, point.seed): found for point, found in rows.items()}
    by_key["SparseGPT", 1]["texts"]["wikipedia_long"] = on_text("wikipedia_long", 25.0)
    by_key["ADMM", 0]["texts"]["wikipedia_long"] = on_text("wikipedia_long", 15.0)
    assert quality.summary(rows, SMOLLM2)[2].startswith("| 50% | 0 | 30.00 | 20.00 | 0.50 | 0.63 |")
    assert "| 20.00 / 15.00 | 20.00 / 15.00 |" in quality.full_table(rows)


def test_a_point_that_the_code_prunes_otherwise_than_is_written_down_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality.behaviour, "load", dict)
    monkeypatch.setattr(quality, "subprocess", None)
    point = next(point for point in POINTS if point.contender == "magnitude")
    with pytest.raises(SystemExit, match="method=magnitude is pruned otherwise than benchmarks/behaviour.json says"):
        quality.measured(point)


def test_the_summary_sets_the_best_against_the_better_published_method_where_sparsegpt_is_measured():
    points = [point for point in POINTS if point.contender in ("Wanda", "SparseGPT", "ADMM") and point.seed == 0]
    found = {"Wanda": 40.0, "SparseGPT": 30.0, "ADMM": 22.0}
    rows = {
        point: row(point, found[point.contender]) | {"seconds": 20 if point.contender == "ADMM" else 5}
        for point in points
        if point.pattern == "50%" or (point.pattern == "60%" and point.contender != "SparseGPT")
    }
    lines = quality.summary(rows, SMOLLM2)
    assert lines[2:] == [
        "| 50% | 0 | 30.00 | 22.00 | 0.60 | 0.72 | 4.0 × | 0.5 GiB (SparseGPT 0.5) | ADMM |"
    ]  # (22 - 10) / (30 - 10), ln 2.2 / ln 3


def test_the_summary_says_where_the_best_has_no_seconds():
    rows = measured_rows({("SparseGPT", 0): 30.0, ("ADMM", 0): 20.0})
    for point in rows:
        if point.contender == "ADMM":
            del rows[point]["seconds"], rows[point]["peak_memory_gib"]
    assert quality.summary(rows, SMOLLM2)[2:] == ["| 50% | 0 | 30.00 | 20.00 | 0.50 | 0.63 | not measured |  | ADMM |"]


def measured_rows(found: dict[tuple[str, int], float]) -> dict:
    """By contender and seed, at 50%."""
    points = {(point.contender, point.seed): point for point in POINTS if point.pattern == "50%"}
    return {points[key]: row(points[key], perplexity) for key, perplexity in found.items()}


def test_the_summary_compares_on_the_seeds_that_both_have():
    rows = measured_rows({("SparseGPT", 0): 30.0, ("SparseGPT", 1): 90.0, ("short ADMM, distilled", 0): 20.0})
    assert quality.summary(rows, SMOLLM2)[2:] == [
        "| 50% | 0 | 30.00 | 20.00 | 0.50 | 0.63 | 1.0 × | 0.5 GiB (SparseGPT 0.5) | short ADMM, distilled |"
    ]


def test_rows_stand_by_their_share_on_the_seeds_that_both_have_not_by_their_means():
    rows = measured_rows({("SparseGPT", 0): 45.0, ("SparseGPT", 1): 40.0, ("SparseGPT, OWL", 0): 44.0, ("RIA", 0): 46.0})
    first, second, third = (line.split("|")[1:3] for line in quality.table(rows, SMOLLM2).split("composed by |")[1].splitlines()[2:5])
    assert first == [" SparseGPT, OWL ", " **44.00** "]
    assert second == [" SparseGPT ", " 42.50 ± 3.54 "]
    assert third == [" RIA ", " 46.00 "]


def test_a_single_seed_is_not_set_above_the_best_of_those_with_more():
    seeds = {(name, seed): 30.0 + seed for name in ("SparseGPT", "ADMM") for seed in range(3)}
    rows = measured_rows({**seeds, ("ADMM", 0): 25.0, ("RIA", 0): 20.0})
    assert quality.summary(rows, SMOLLM2)[2].endswith("| ADMM |")
    text = quality.table(rows, SMOLLM2)
    assert "\n| RIA | 20.00 |" in text
    assert "\n| ADMM | **29.33 ± 3.79** |" in text


def test_the_better_published_method_is_that_on_the_seeds_that_all_have():
    """Wanda's one seed is worse than SparseGPT's mean, and better than its same seed."""
    rows = measured_rows({("SparseGPT", 0): 60.0, ("SparseGPT", 1): 30.0, ("Wanda", 0): 50.0, ("ADMM", 0): 20.0})
    assert quality.summary(rows, SMOLLM2)[2:] == ["| 50% | 0 | 50.00 | 20.00 | 0.25 | 0.43 | 1.0 × | 0.5 GiB (SparseGPT 0.5) | ADMM |"]


def test_a_second_text_stands_beside_the_first_with_its_own_share():
    rows = measured_rows({("SparseGPT", 0): 30.0, ("ADMM", 0): 20.0, ("RIA", 0): 40.0})
    for found, perplexity in zip(rows.values(), (25.0, 10.0), strict=False):
        found["texts"]["wikipedia_long"] = on_text("wikipedia_long", perplexity, dense=5.0)
    assert quality.summary(rows, SMOLLM2)[2].startswith("| 50% | 0 | 30.00 / 25.00 | 20.00 / 10.00 | 0.50 / 0.25 | 0.63 / 0.43 |")
    text = quality.table(rows, SMOLLM2)
    assert "\n| RIA | 40.00 |" in text
    assert "100 tokens of wikipedia in windows of 10, none begun with BOS (dense 10.00) / 100 tokens of wikipedia_long in windows" in text
    assert "| 0 | 20.00 / 10.00 | 20.00 / 10.00 | 2.00 / 2.00 | 0.50 / 0.25 | 0.63 / 0.43 |" in quality.full_table(rows)


def test_each_model_has_a_table_of_its_own_points():
    point = next(point for point in contenders.points(GEMMA3) if point.contender == "ADMM")
    smollm2, gemma3 = quality.tables({point: row(point, 30.0)}).split(f"**{GEMMA3.label}**")
    assert "Nothing is measured yet." in smollm2 and SMOLLM2.label in smollm2
    assert "\n| ADMM | **30.00** |" in gemma3
    full = quality.full_table({point: row(point, 30.0)})
    assert f"## {GEMMA3.label}\n\nPerplexity on 100 tokens of wikipedia" in full
    assert "none begun with BOS (dense 10.00).\n\n### 50%\n\n| method" in full


def test_a_cell_whose_points_have_no_seconds_has_none_in_the_table():
    (point,) = (point for point in POINTS if (point.contender, point.pattern, point.seed) == ("RIA", "50%", 0))
    of_point = {key: value for key, value in row(point, 30.0).items() if key not in quality.COSTS}
    (line,) = [line for line in quality.full_table({point: of_point}).splitlines() if line.startswith("| RIA |")]
    assert line.split(" | ")[-3:-1] == ["", ""]


def test_seconds_are_compared_with_the_mean_of_all_that_sparsegpt_took():
    rows = measured_rows({("SparseGPT", 0): 30.0, ("SparseGPT", 1): 30.0, ("ADMM", 0): 20.0})
    for seconds, found in zip((4, 6, 10), rows.values(), strict=True):
        found["seconds"] = seconds
    assert "| 2.0 × |" in quality.summary(rows, SMOLLM2)[2]


def test_how_far_seconds_are_to_be_trusted_is_told_where_a_cell_has_several_seeds():
    rows = measured_rows({("SparseGPT", 0): 45.0, ("SparseGPT", 1): 40.0, ("RIA", 0): 46.0})
    for seconds, found in zip((5, 6, 50), rows.values(), strict=True):
        found["seconds"] = seconds
    assert "took up to 1.20 times the seconds of the fastest" in quality.full_table(rows)
    assert "the fastest" not in quality.full_table(measured_rows({("RIA", 0): 46.0}))


def test_the_leaderboard_says_nothing_of_shares_or_pace_where_no_published_method_is_measured():
    point = next(point for point in POINTS if point.contender == "ADMM")
    assert "| 0 | 40.00 | 40.00 | 4.00 |  |  | 0.1000 | 5 | 0.50 GiB |" in quality.full_table({point: row(point, 40.0)})


@pytest.fixture(scope="module")
def small_project():
    with behaviour.project():
        yield


@pytest.mark.parametrize("point", behaviour.cells(), ids=lambda point: point.cell)
def test_what_is_pruned_is_what_the_leaderboard_was_measured_with(point, small_project):
    """If a change is meant, python -m benchmarks.behaviour writes the new figures, and the cells' points are stale."""
    found = behaviour.measured(point)
    assert behaviour.as_written(found, point.cell), f"found {found}, wanted {KNOWN[point.cell]}"


def test_a_point_is_stale_when_its_cell_has_other_figures_since():
    found = row(POINTS[0], 30.0) | {"behaviour": {"error": 0.1, "output": 0.5}}
    cell = POINTS[0].cell
    assert not quality.stale(found, {cell: {"error": 0.1, "output": 0.5 + 1e-4}})
    assert quality.stale(found, {cell: {"error": 0.1, "output": 0.52}})
    assert quality.stale(found, {})
    assert quality.stale(found, {cell: {"error": 0.1, "output": 0.5, "revision": 1}})


def test_each_figure_that_llama_cpp_prints_is_read_with_its_error():
    values = {label: f"{number}.5" for number, label in enumerate(llama_cpp_divergence.PRINTED)}
    lines = [f"{label.replace(' ', '    ', 1)}: {value}%" for label, value in values.items()]
    read = llama_cpp_divergence.printed_figures("\n".join([*lines, "Mean    KLD:   0.250000 ±   0.125000", "Median  Δp: -1.0%"]))
    wanted = {name: float(values[label]) for label, name in llama_cpp_divergence.PRINTED.items()}
    assert read == wanted | {"mean_kld": 0.25, "mean_kld_stderr": 0.125}


def test_a_figure_that_llama_cpp_does_not_print_is_named():
    with pytest.raises(ValueError, match="^llama-perplexity: found no Maximum KLD, no 99.9% KLD, .* in what it prints$"):
        llama_cpp_divergence.printed_figures("Mean    KLD:   0.25 ±   0.125")


def test_what_is_compared_of_a_token_is_of_both_distributions():
    model, dense = torch.tensor([[0.375, 0.625], [0.25, 0.75]]).double(), torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double()
    kld, delta_p, same_top, nll, dense_nll = llama_cpp_divergence.of_tokens(model.log(), dense.log(), torch.tensor([1, 0]))
    assert kld.tolist() == pytest.approx([0.75 * math.log(2) + 0.25 * math.log(0.4), 0])
    assert delta_p.tolist() == pytest.approx([0.375, 0])
    assert same_top.tolist() == [False, True]
    assert nll.tolist() == pytest.approx([math.log(1.6), math.log(4)])
    assert dense_nll.tolist() == pytest.approx([math.log(4), math.log(4)])


def test_what_is_unlikely_by_the_dense_model_counts_for_llama_cpp_as_nothing():
    model, dense = torch.tensor([[0.5, 0.25, 0.25]]).double().log(), torch.tensor([[0.5, 0.5, 1e-9]]).double().log()
    kld, *_ = llama_cpp_divergence.of_tokens(model, dense, torch.tensor([0]), above=llama_cpp_divergence.LOWEST)
    assert kld.item() == pytest.approx(0.5 * math.log(2), rel=1e-12)


def test_log_probabilities_are_stored_in_even_steps_down_to_sixteen_below_the_highest():
    step = 16 / 65535
    stored = llama_cpp_divergence.as_stored(torch.tensor([[-1.0, -1 - 10.4 * step, -16.9, -30.0]]).double())
    assert stored[0].tolist() == pytest.approx([-1, -1 - 10 * step, -17 + 410 * step, -17], abs=1e-9)
    narrow = torch.tensor([[-1.0, -2.0]]).double()
    assert llama_cpp_divergence.as_stored(narrow)[0].tolist() == pytest.approx([-1, -2])


def test_the_readmes_table_says_how_much_of_each_text_was_scored():
    facts = {"count": 8, "counted": "tokens", "clusters": 2, "value": 0.5, "difference": Difference(value=0.0), "label": "", "name": "news"}
    metrics = ("perplexity", "perplexity_ratio", "mean_kld", "accuracy")
    measured = as_rows(Measurement(kind=Kind.CORPUS, metric=metric, **facts) for metric in metrics)
    windows = {"window_length": 64, "windows": 18, "tokens": 1152, "available": 1301}
    boolq = {"rows": 20, "available": 3270, "parts": 1}
    protocol = {
        "corpora": {"news": windows},
        "bos": None,
        "tasks": {"boolq": boolq, "rte": {**boolq, "available": 277}},
        "evaluation": {"corpora": {"news": {"evenly": False}}},
    }
    point = {"method": "wanda", "pattern": "2:4", "sparsity": 0.5, "command": "dvc exp run", "measured": measured, "dense": measured}
    run = {"seconds": 1.0, "peak_memory_gib": 1.0, "device": "a CPU", "dtype": "float32"}
    text = table.table([{**point, "protocol": protocol, "prune": run}])
    scored = "on 1152 tokens of News in windows of 64, the first 18 of 1,301 windows, none begun with BOS"
    assert f"{scored}; zero-shot, 2 tasks, 20 rows each" in text
    assert ", the first of 277 to 3,270; accuracy over dense" in text


def test_figures_of_five_tokens_are_those_by_hand():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).double()
    figures = llama_cpp_divergence.figures(values, values / 10, values > 0, values, 2 * values + 1)
    assert figures["mean_kld"] == figures["median_kld"] == 2
    assert figures["mean_kld_stderr"] == pytest.approx(math.sqrt(2.5 / 5))
    assert (figures["minimum_kld"], figures["maximum_kld"]) == (0, 4)
    assert (figures["kld_90"], figures["kld_10"]) == pytest.approx((3.6, 0.4))
    assert (figures["mean_delta_p"], figures["rms_delta_p"]) == pytest.approx((20, 100 * math.sqrt(0.06)))
    assert figures["same_top_p"] == pytest.approx(80)
    assert figures["same_top_p_stderr"] == pytest.approx(20)
    assert figures["ln_ppl_correlation"] == pytest.approx(100)
    assert figures["perplexity_ln_ratio"] == -3
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(-3))


def logits_file(path: Path, magic: bytes = b"_logits_") -> Path:
    count, length = llama_cpp_divergence.WINDOWS, llama_cpp_divergence.WINDOW_LENGTH
    header = struct.pack("<8siii", magic, length, 3, count)
    path.write_bytes(header + struct.pack(f"<{count * length}i", *range(count * length)) + b"probabilities")
    return path


@pytest.mark.parametrize(("bos", "first"), [(None, [0, 512]), (7, [7, 7])])
def test_the_windows_are_the_tokens_of_llama_cpps_file(tmp_path, bos, first):
    windows = llama_cpp_divergence.read_windows(logits_file(tmp_path / "x"), bos)
    assert windows[:2, 0].tolist() == first
    assert windows[1, 1].item() == 513


def test_a_file_that_llama_cpp_did_not_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x: found b'12345678' and 12 windows of 512 tokens, wanted b'_logits_' and 12 windows of 512$"):
        llama_cpp_divergence.read_windows(logits_file(tmp_path / "x", b"12345678"), None)


@pytest.mark.parametrize("name", read_json(ROOT / llama_cpp_divergence.FILE))
def test_our_figures_of_a_divergence_are_llama_cpps_where_both_round_alike(name):
    known = read_json(ROOT / llama_cpp_divergence.FILE)[name]
    assert known["weights_that_differ"] == 0
    for figure, value in known["llama_cpp"].items():
        assert known["ours_rounded"][figure] == pytest.approx(value, rel=2e-3, abs=1e-6), figure
        assert known["ours"][figure] == pytest.approx(value, rel=2e-3, abs=1e-3), figure


def test_the_evaluations_divergence_has_the_figures_that_are_set_beside_llama_cpps():
    generator = torch.Generator().manual_seed(0)
    kld, delta_p, nll, dense_nll = (torch.rand(4, 50, generator=generator, dtype=torch.float64) for _ in range(4))
    same_top = torch.rand(4, 50, generator=generator) > 0.4
    wanted = llama_cpp_divergence.figures(*(values.flatten() for values in (kld, delta_p, same_top, nll, dense_nll)))
    corpus = Corpus(name="articles", windows=torch.zeros(4, 51, dtype=torch.int64), clusters=[0, 1, 2, 3])
    observed = {"kld": kld, "delta_p": delta_p, "same_top": same_top.double(), "nll": nll, "dense_nll": dense_nll}
    dense = {"nll": dense_nll.mean(dim=1).tolist()}
    ours = {one.metric: one.value for metric in METRICS.values() for one in metric.measure(corpus, observed, dense)}
    names = [name for name in wanted if not name.endswith("_stderr")]
    assert {name: ours[name] for name in names} == pytest.approx({name: wanted[name] for name in names})


def test_the_frontier_is_a_sweep_of_five_sparsities_by_three_methods_of_one_protocol():
    sections = [read(*overrides.split()) for overrides in frontier.points()]
    assert len({(one["method"].name, one["pattern"].sparsity) for one in sections}) == 15
    assert len({str(one["evaluation"]) for one in sections}) == 1
    assert sections[0]["ruler"].types == ["Q8_0", "Q4_0", "Q2_K"]


def test_what_experiments_share_is_counted_once_on_the_disk():
    def lock(**sizes: int) -> dict:
        paths = {"base": "artifacts/base", "sparse": "artifacts/sparse", "metrics": "results/sparse/metrics.json", "release": "release"}
        return {"all": {"outs": [{"path": paths[name], "md5": f"{name} {size}", "size": size} for name, size in sizes.items()]}}

    first, second = disk.growth([("a", lock(base=100, sparse=6, metrics=1, release=99)), ("b", lock(base=100, sparse=5, metrics=1))])
    assert (first.others, first.delta, first.results, first.release, first.total) == (100, 6, 1, 99, 206)
    assert (second.base, second.delta, second.total) == (100, 5, 5)


def test_orders_of_pruning_are_compared_on_the_seeds_that_all_have():
    def found(point: contenders.Point) -> dict:
        perplexity = 30.0 + point.seed - 2 * ("sequential" in point.overrides)
        texts = {text: {"perplexity": perplexity + 10 * number} for number, text in enumerate(contenders.TEXTS)}
        cost = {"seconds": 20 if "exact" in point.overrides else 10, "peak_memory_gib": 0.5}
        return {"texts": texts, "device": "a processor", **cost}

    wanda = [point for point in orders.points() if (point.contender, point.pattern, point.base) == ("Wanda", "2:4", GEMMA3.base)]
    rows = {point: found(point) for point in wanda if point.seed == 0 or "sequential" not in point.overrides}
    text = orders.tables(rows)
    cells = "30.00 / 40.00 | 30.00 / 40.00 | 28.00 / 38.00 | 0.50 × | 0.50 × | 1.00 × | 1.00 ×"
    assert f"| Wanda | 2:4 | 0 | {cells} |" in text
    rows |= {point: found(point) for point in wanda if point.seed == 1}
    assert "| Wanda | 2:4 | 0, 1 | 30.50 ± 0.71 / 40.50 ± 0.71 |" in orders.tables(rows)
    assert SMOLLM2.label not in text and f"{len(orders.points()) - len(rows)} of {len(orders.points())}" in orders.tables(rows)


def test_points_that_were_measured_with_others_at_once_have_no_seconds(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = quality.load()
    together = [row for row in known.values() if "workers" in row]
    assert together
    assert not any(key in row for row in together for key in quality.COSTS)
    for model in contenders.MODELS:
        assert quality.full_table(quality.of_model(known, model))
    assert quality.with_others({}) == ""
    assert quality.with_others({0: {"seconds": 1}, 1: {}}) == "Without seconds and memory, since the machine did much other work: 1 point."
    wanda = [point for point in orders.points() if (point.contender, point.pattern, point.base) == ("Wanda", "2:4", GEMMA3.base)]
    texts = {text: {"perplexity": 30.0} for text in contenders.TEXTS}
    text = orders.tables({point: {"texts": texts, "device": "a GPU"} for point in wanda if point.seed == 0})
    assert "| Wanda | 2:4 | 0 | 30.00 / 30.00 | 30.00 / 30.00 | 30.00 / 30.00 | not measured |" in text


def test_a_model_written_at_other_scales_stands_with_the_ratio_of_both():
    facts = {"base": contenders.SMOLLM2.base, "dense": 30.0, "device": "a CPU", "code": "0123456789"}
    rows = [{**facts, "written": way, "perplexity": value} for way, value in zip(rescale.WAYS, (40.0, 41.0), strict=True)]
    assert "| 30.000 | 40.000 | 41.000 | 1.025 |" in rescale.table(rows)
    assert rescale.table(rows[:1]) == "Not measured yet."
    assert rescale.table(read_json(ROOT / rescale.RESULTS)) in (ROOT / rescale.DOCUMENT).read_text()


@pytest.fixture
def no_tables(tmp_path, monkeypatch):
    """Leaderboard and orders of which nothing is measured."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.json")
    monkeypatch.setattr(orders, "RESULTS", tmp_path / "orders.json")
    return tmp_path


def test_what_a_gpu_measured_is_taken_into_its_table_if_the_code_is_this_one(no_tables):
    points = {table: next(point for name, point in on_gpu.due({}) if name == table) for table in on_gpu.TABLES}
    facts = {"texts": dict.fromkeys(contenders.TEXTS, {}), "code_sha256": code_sha256()}
    rows = {table: [{**dataclasses.asdict(point), **facts}] for table, point in points.items()}
    write_json(no_tables / "rows.json", rows)
    on_gpu.take(no_tables / "rows.json")
    assert list(orders.load()) == [points["orders"]]
    (row,) = quality.load().values()
    assert (quality.of_row(row), row["behaviour"]) == (points["quality"], behaviour.load()[points["quality"].cell])
    left = {table: {point for name, point in on_gpu.due({}) if name == table} for table in on_gpu.TABLES}
    assert not any(points[table] in left[table] for table in points)
    rows["orders"][0]["code_sha256"] = "of another day"
    write_json(no_tables / "rows.json", rows)
    with pytest.raises(SystemExit, match="found rows of the code \\['of another day'\\], wanted"):
        on_gpu.take(no_tables / "rows.json")


def test_rows_of_another_run_of_the_gpu_benchmark_stay_where_some_alone_are_measured(tmp_path, monkeypatch):
    first = {"device": "A", "torch": "2", "transformers": "5", "commit": "1", "blocks": 32}
    second = first | {"device": "B", "commit": "2"}
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    label, other = "wanda, exact", "wanda, sequential"
    gpu.Results(first, {}, {label: 1.0, other: 2.0}).write()
    machine = SimpleNamespace(facts=lambda: second, words=["sequential"])
    results = gpu.Results.of(machine)
    assert (results.has(other, "commit 1 on A"), results.has(other, "commit 2 on B")) == (True, False)
    assert results.by_block == {label: 1.0, other: 2.0}  # until it is measured again
    results.by_block[other] = 3.0
    results.measured(other, "commit 2 on B")
    results = gpu.Results.of(machine)
    assert results.by_block == {label: 1.0, other: 3.0}
    assert results.has(other, "commit 2 on B")
    assert "one run each: commit 1 on A; commit 2 on B: wanda, sequential. The floor" in results.remarks()
    machine.words = []
    assert gpu.Results.of(machine).by_block == {}


def test_rows_of_other_code_are_measured_again_on_a_gpu(tmp_path):
    write_json(tmp_path / "rows.json", {"quality": [{"seed": 0, "code_sha256": "a"}, {"seed": 1, "code_sha256": "b"}]})
    assert on_gpu.kept(tmp_path / "rows.json", "b") == {"orders": [], "quality": [{"seed": 1, "code_sha256": "b"}]}
    assert on_gpu.kept(tmp_path / "none.json", "b") == {"orders": [], "quality": []}


def test_every_order_of_pruning_composes():
    propagates = {"exact": "pruned", "one_pass": "dense", "sequential": "sequential"}
    points = [(method, order) for method in orders.METHODS for order in orders.orders_of(method)]
    for method, order in points:
        section = read(*orders.overrides(method, "2:4", order).split(), "pattern=nm_2_4", "evaluation=perplexity")["prune"]
        assert section.propagate == propagates[order]


@pytest.mark.parametrize("error", [ValueError("found 3\nlayers"), ImportError("found 3 layers")])
def test_a_type_that_is_not_built_small_is_counted_as_such_with_the_reason(error, monkeypatch):
    def write(*_):
        raise error

    monkeypatch.setattr(census, "write", write)
    assert census.outcome("llama") == {"state": "not built", "reason": f"{type(error).__name__}: found 3 layers"}


def test_what_is_no_decoder_language_model_is_told_by_its_type_and_not_by_words_of_a_message(monkeypatch):
    def write(*_):
        raise AssertionError

    monkeypatch.setattr(census, "write", write)
    for kind in ("musicgen", "gemma4_unified_assistant"):
        assert census.outcome(kind)["state"] == "not a decoder"


@pytest.mark.filterwarnings("default")  # of models at their small sizes
def test_a_type_whose_text_model_no_class_loads_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = census.outcome("mllama")
    assert found["state"] == "refused"
    assert found["reason"] == "its checkpoint: transformers knows no decoder language model of type 'mllama_text_model'"


def test_outcomes_are_kept_by_the_code_that_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = census.code_sha256()
    assert before == census.code_sha256()
    changed = tmp_path / "small_models.py"
    changed.write_text(census.CODE[1].read_text() + "# changed")
    monkeypatch.setattr(census, "CODE", (census.CODE[0], changed, census.CODE[2]))
    assert census.code_sha256() != before


def test_what_long_evaluations_take_is_projected_from_a_window_and_rows_and_short_runs_are_part_of_them():
    names = read("evaluation=full")["evaluation"].tasks
    tasks = {name: {"row": 0.5, "rows": 720} for name in names}  # a tenth of an hour each
    facts = {"model": "M", "device": "a CPU", "dtype": "float32", "code": "abcdef123", "whole": {"quick": 90.4}}
    text = evaluation_seconds.table({**facts, "window": 2.0, "windows": 100, "tasks": tasks})
    assert "| `quick` | 90 s | run whole |" in text
    assert "| `full` | 4 minutes of windows, 0.9 hours of tasks |" in text  # 132 windows, nine tasks
    assert "| `paper` | 0.7 hours of tasks | projected from the first windows and rows; its windows, of another text, 2.0 s each |" in text
    short = read(*evaluation_seconds.short(windows=2, tasks="piqa", rows=8))["evaluation"]
    assert (short.tasks, short.rows, short.corpora["wikipedia"].windows, list(short.corpora)) == (["piqa"], 8, 2, ["wikipedia"])
    assert short.corpora["wikipedia"].window_length == read("evaluation=full")["evaluation"].corpora["wikipedia"].window_length


def test_scores_in_float8_stand_below_those_of_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FLOAT8_RESULTS.mkdir(parents=True)
    write_json(FLOAT8_RESULTS / "measurements.json", [])
    with pytest.raises(SystemExit, match="found no scores, wanted those of dvc exp run -S publish.dtype=float8"):
        float8_scores.measured()
    scores = {
        "as it is": {"perplexity": [30.0, 2.0], "accuracy": [0.4, None]},
        "float8": {"perplexity": [30.5, 2.1], "accuracy": [0.41, None]},
    }
    row = {"model": "org/model", "pruned": "wanda, unstructured", "text": "news, 512 tokens", "scores": scores}
    row |= {"sparsity": {"as it is": 0.5, "float8": 0.5012}, "bytes": {"as it is": 2_000_000, "float8": 1_200_000}}
    shown = float8_scores.table([{**row, "device": "a CPU", "code": "0123456789"}])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    assert lines[0] == ["model", "pruned by", "weights", "perplexity", "mean KLD, nats", "accuracy", "zeros in scope", "safetensors"]
    assert lines[2][2:] == ["as it is", "30.00 ± 2.00", "not measured", "0.400", "0.5000", "2 MB"]
    assert lines[3][2:] == ["float8", "30.50 ± 2.10", "not measured", "0.410", "0.5012", "1 MB"]
    assert shown.endswith(
        "commit 0123456. ± is one standard error over the text, which both lines share. One run each; no other text or seed was measured."
    )
