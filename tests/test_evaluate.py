"""The evaluate stage on a small base: dense, then sparse, in a directory of its own."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages import evaluate, evaluate_quantised
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError, ComparisonError, ConfigError, SparsesweepError, TextError
from stages.evaluation import running, setup
from stages.evaluation.section import Evaluation, Generations, Ruler, Windows
from stages.files import read_json, sha256
from stages.sources import base as checkpoints
from stages.sources.base import LocalBase
from tests import tiny
from tests.evaluation import delta as deltas

WINDOWS = Windows(window_length=64, windows=4, evenly=False)
EVALUATION = Evaluation(
    name="tiny",
    device="cpu",
    dtype="float32",
    bos="auto",
    corpora={"articles": WINDOWS},
    metrics=["perplexity", "divergence"],
    tasks=["boolq", "piqa"],
    rows=4,
    few_shot=None,
    styles=["raw"],
    examples=2,
    system_prompt="Answer briefly.",
    batch_size=4,
    streamed=False,
    generations=Generations(new_tokens=3, prompts=["river stone"]),
)
VALUES = {"acc": 1.0, "acc_norm": 0.0}
WORDS = tiny.sentences(12, seed=3, length=8)
BOOLQ = [{"question": WORDS[i], "passage": WORDS[-1], "idx": i, "label": i % 2} for i in range(8)]
PIQA = [{"goal": WORDS[i], "sol1": "lamp", "sol2": "river", "label": i % 2} for i in range(8)]


def run(part: str, evaluation: Evaluation = EVALUATION) -> None:
    evaluate.main.function(part=part, evaluation=evaluation)


def write_text(root) -> None:
    directory = root / "artifacts/text/evaluation"
    tiny.write_lines(directory / "articles.jsonl", [{"text": text} for text in tiny.sentences(20, seed=5)])
    tiny.write_lines(directory / "others.jsonl", [{"text": text} for text in tiny.sentences(20, seed=6)])
    tiny.write_lines(directory / "boolq.jsonl", BOOLQ)
    tiny.write_lines(directory / "piqa.jsonl", PIQA)


@pytest.fixture(scope="module")
def evaluated(canonical, tmp_path_factory):
    """A directory with a base, text, a delta and the dense model's results."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(canonical, root / "artifacts/base")
    write_text(root)
    deltas.write(root / "artifacts/sparse", Checkpoint(root / "artifacts/base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("dense")
    return root


@pytest.fixture()
def root(evaluated, tmp_path, monkeypatch):
    """A copy of it, in which the test runs."""
    shutil.copytree(evaluated, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def forbid_weights(root) -> None:
    """Make every weight NaN, which no stage reads without an error."""
    for shard in (root / "artifacts/base").glob("*.safetensors"):
        content = shard.read_bytes()
        data = 8 + int.from_bytes(content[:8], "little")
        shard.write_bytes(content[:data] + b"\xff" * (len(content) - data))


def test_the_dense_model_is_evaluated_without_a_delta(root):
    shutil.rmtree(root / "artifacts/sparse")
    before = read_json(root / "results/dense/metrics.json")
    run("dense")
    assert read_json(root / "results/dense/metrics.json") == before
    assert set(before["corpora"]["articles"]) == {"perplexity", "perplexity_stderr"}
    assert set(before["tasks"]["piqa"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(before["mean"]["tasks"]) == {"accuracy"}  # all rows of boolq share a passage: no error is known
    written = {path.name for path in (root / "results/dense").rglob("*") if path.is_file()}
    details = {"measurements.json", "windows.json", "generations.json", "protocol.json", "samples-boolq.jsonl", "samples-piqa.jsonl"}
    assert written == {"metrics.json", "run.json", *details}


def test_the_dense_models_states_serve_the_pruned_model_to_the_last_bit(root, monkeypatch):
    def results() -> dict[str, str]:
        return {path.name: path.read_text() for path in (root / "results/sparse/details").iterdir()}

    models = []
    original = running.StreamedModels
    monkeypatch.setattr(running, "StreamedModels", lambda **facts: models.append(list(facts["variants"])) or original(**facts))
    assert read_json(root / "artifacts/dense/states.json")["kept"]
    run("sparse")
    kept = results()
    manifest = root / "artifacts/dense/states.json"
    of = read_json(manifest)
    for other in ({**of, "kept": False}, {**of, "fingerprint": "another"}, {**of, "device": "another"}, None):
        if other is None:
            shutil.rmtree(root / "artifacts/dense")
        else:
            manifest.write_text(json.dumps(other))
        run("sparse")
        assert results() == kept
    assert models == [["sparse"], *[["dense", "sparse"]] * 4]


def test_states_are_kept_by_a_run_that_goes_on_where_another_failed(root, monkeypatch):
    whole = sha256(root / "artifacts/dense/states.safetensors")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write", interrupt)
        run("dense")
    shutil.rmtree(root / "artifacts/dense")
    run("dense")
    assert sha256(root / "artifacts/dense/states.safetensors") == whole


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_states_that_are_too_large_or_serve_nothing_are_not_kept(root, monkeypatch):
    monkeypatch.setattr("stages.evaluation.dense_states.LIMIT", 100)
    run("dense")
    assert [path.name for path in (root / "artifacts/dense").iterdir()] == ["states.json"]
    monkeypatch.undo()
    monkeypatch.chdir(root)
    run("dense", replace(EVALUATION, metrics=["perplexity"]))
    assert not read_json(root / "artifacts/dense/states.json")["kept"]


def test_damaged_states_are_named(root):
    (root / "artifacts/dense/states.safetensors").write_bytes(b"cut")
    with pytest.raises(SparsesweepError, match="artifacts/dense/states.safetensors: damaged .*; run python -m stages.evaluate part=dense"):
        run("sparse")
    save_file({"articles": torch.zeros(1, 2, 3)}, root / "artifacts/dense/states.safetensors")
    with pytest.raises(SparsesweepError, match="damaged .found .1, 2, 3. of articles, torch.float32, wanted"):
        run("sparse")
    (root / "artifacts/dense/states.json").write_text("[]")
    with pytest.raises(SparsesweepError, match="artifacts/dense/states.json: damaged .found"):
        run("sparse")


def test_the_protocol_says_what_was_scored(root):
    protocol = read_json(root / "results/dense/details/protocol.json")
    articles = protocol["corpora"]["articles"]
    assert (articles["window_length"], articles["windows"], articles["tokens"]) == (64, 4, 256)
    assert articles["available"] > 4
    assert {name: (task["rows"], task["available"], task["asked"]) for name, task in protocol["tasks"].items()} == {
        "boolq": (4, 8, 4),
        "piqa": (4, 8, 4),
    }
    assert (protocol["evaluation"]["name"], protocol["delta"]) == ("tiny", None)
    assert protocol["base"] == Checkpoint(root / "artifacts/base").fingerprint


def test_the_pruned_model_is_scored_beside_the_dense_one(root):
    run("sparse")
    dense, sparse = (read_json(root / f"results/{part}/metrics.json") for part in ("dense", "sparse"))
    scores, dense_scores = sparse["corpora"]["articles"], dense["corpora"]["articles"]
    assert scores["dense_perplexity"] == pytest.approx(dense_scores["perplexity"])
    assert scores["perplexity_ratio"] == pytest.approx(scores["perplexity"] / dense_scores["perplexity"])
    assert scores["perplexity_ln_ratio"] == pytest.approx(math.log(scores["perplexity_ratio"]))
    assert scores["perplexity_difference"] == pytest.approx(scores["perplexity"] - dense_scores["perplexity"])
    assert 0 < scores["minimum_kld"] <= scores["median_kld"] <= scores["mean_kld"] <= scores["maximum_kld"]
    assert sparse["mean"]["tasks"]["dense_accuracy"] == dense["mean"]["tasks"]["accuracy"]
    rows = read_json(root / "results/sparse/accuracy.json")
    assert [(row["model"], row["task"]) for row in rows] == [
        ("dense", "boolq"),
        ("dense", "piqa"),
        ("sparse", "boolq"),
        ("sparse", "piqa"),
    ]
    boolq, piqa = read_json(root / "results/sparse/details/paired.json")
    assert (boolq["task"], boolq["rows"], boolq["clusters"], boolq["stderr"], boolq["low"]) == ("boolq", 4, 1, None, None)  # one passage
    assert (piqa["task"], piqa["metric"], piqa["rows"], piqa["clusters"]) == ("piqa", "acc", 4, 4)
    for task in (boolq, piqa):
        assert (task["dense"], task["sparse"]) == (dense["tasks"][task["task"]]["acc"], sparse["tasks"][task["task"]]["acc"])
        assert task["difference"] == pytest.approx(task["sparse"] - task["dense"])
        assert task["gained"] - task["lost"] == round(4 * task["difference"])
        assert task["low"] is None or -1 <= task["low"] <= task["difference"] <= task["high"] <= 1
    accuracy = sparse["mean"]["tasks"]
    assert accuracy["accuracy_difference"] == pytest.approx(accuracy["accuracy"] - accuracy["dense_accuracy"])
    assert "accuracy_difference_stderr" not in accuracy
    speed = read_json(root / "results/sparse/run.json")["generation"]
    assert speed["tokens_per_second"] == pytest.approx(speed["tokens"] / max(speed["seconds"], 0.01), abs=0.01)
    assert 0 < speed["peak_memory_gib"] <= read_json(root / "results/sparse/run.json")["peak_memory_gib"]
    (generated,) = read_json(root / "results/sparse/details/generations.json")
    assert set(generated) == {"prompt", "raw_dense", "raw_sparse", "chat_dense", "chat_sparse"}
    (point,) = read_json(root / "results/sparse/frontier.json")
    assert (point["method"], point["corpus"], point["perplexity"]) == ("random", "articles", scores["perplexity"])
    assert not list(root.glob("results/**/details/accuracy.json"))
    assert not [path for path in (root / "results").iterdir() if path.name.startswith(".")]


def test_the_two_protocols_differ_in_the_delta_alone(root):
    run("sparse")
    dense, sparse = (read_json(root / f"results/{part}/details/protocol.json") for part in ("dense", "sparse"))
    assert sparse.pop("delta") == deltas.SparseDelta(root / "artifacts/sparse", dense["base"]).fingerprint
    dense.pop("delta")
    assert dense == sparse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"corpora": {"articles": replace(WINDOWS, window_length=32)}},
            "corpora.articles.window_length: 64 against 32; corpora.articles.tokens: 256 against 128; corpora.articles.windows_sha256: ",
        ),
        (
            {"corpora": {"articles": replace(WINDOWS, windows=5)}},
            "corpora.articles.windows: 4 against 5; corpora.articles.tokens: 256 against",
        ),
        ({"corpora": {"others": WINDOWS}}, r"corpora.articles: {.*} against None; corpora.others: None against {"),
        ({"metrics": ["perplexity"]}, r"metrics: \['perplexity', 'divergence'\] against \['perplexity'\]"),
        ({"rows": 3}, "tasks.boolq.rows: 4 against 3; tasks.piqa.rows: 4 against 3"),
        ({"tasks": ["boolq"]}, r"tasks.piqa: {'rows': 4, .*} against None"),
        ({"generations": Generations(new_tokens=3, prompts=["lamp"])}, r"prompts: \['river stone'\] against \['lamp'\]"),
        ({"generations": Generations(new_tokens=4, prompts=["river stone"])}, "new_tokens: 3 against 4"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' against 'bfloat16'"),
    ],
)
def test_a_dense_model_that_was_scored_otherwise_is_refused_before_a_weight_is_read(root, changes, message):
    forbid_weights(root)
    wanted = f"results/dense and this evaluation are not of the same protocol, wanted equal values of {message}"
    with pytest.raises(ComparisonError, match=wanted) as caught:
        run("sparse", replace(EVALUATION, **changes))
    assert "python -m stages.evaluate part=dense" in str(caught.value)
    assert "dvc repro --force --single-item evaluate_dense" in str(caught.value)
    assert not (root / "results/sparse").exists()


def test_other_text_by_the_same_names_is_refused(root):
    directory = root / "artifacts/text/evaluation"
    tiny.write_lines(directory / "articles.jsonl", [{"text": text} for text in tiny.sentences(20, seed=7)])
    tiny.write_lines(directory / "piqa.jsonl", [*PIQA[1:], PIQA[0]])
    with pytest.raises(ComparisonError, match=r"values of corpora.articles.sha256: '\w+' against '\w+'; .*; tasks.piqa.sha256: "):
        run("sparse")


def test_another_base_is_refused(root):
    other = tiny.write_checkpoint(root / "other", seed=1)
    shutil.rmtree(root / "artifacts")
    (root / "artifacts/base").mkdir(parents=True)
    local = LocalBase(source="local", path=str(other), name="tests/other", fingerprint=None, license="mit")
    checkpoints.fetch(local, root / "artifacts/base", downloads=root / "unused")
    write_text(root)
    deltas.write(root / "artifacts/sparse", Checkpoint(root / "artifacts/base"))
    with pytest.raises(ComparisonError, match=r"wanted equal values of base: '\w{64}' against '\w{64}'; evaluate the dense model"):
        run("sparse")


def test_scores_of_a_run_that_was_cut_are_of_this_configuration_of_the_base(root, tmp_path):
    """A publisher mends config.json, and the weights stay."""

    def fingerprint(scratch: str) -> dict[str, Any]:
        (tmp_path / scratch).mkdir()
        return setup.prepare(EVALUATION, tmp_path / scratch).fingerprint(None)

    before = fingerprint("first")
    assert fingerprint("second") == before
    path = root / "artifacts/base/config.json"
    path.write_text(json.dumps(read_json(path) | {"rms_norm_eps": 1e-4}))
    assert fingerprint("third") != before


def test_other_versions_are_refused(root):
    path = root / "results/dense/details/protocol.json"
    protocol = read_json(path)
    protocol["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(protocol))
    with pytest.raises(ComparisonError, match="wanted equal values of versions.torch: '1.0' against"):
        run("sparse")


def test_missing_dense_results_are_named_with_what_to_do(root):
    shutil.rmtree(root / "results/dense")
    with pytest.raises(ComparisonError, match=r"results/dense/details/protocol.json: not found; .*python -m stages.evaluate part=dense"):
        run("sparse")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("protocol", "{", "not JSON"),
        ("protocol", '{"corpus": "articles"}', "found a protocol of corpus, wanted base"),
        ("windows", "[1.0, 2.0]", "wanted 4 finite losses of articles, as protocol.json says"),
        ("windows", '{"articles": {"nll": [1.0, 2.0]}}', "wanted 4 finite losses of articles"),
        ("windows", '{"articles": {"nll": [1.0, 2.0, 3.0, NaN]}}', "wanted 4 finite losses of articles"),
        ("windows", '{"others": {"nll": [1.0, 2.0, 3.0, 4.0]}}', "wanted 4 finite losses of articles"),
        ("generations", "[]", r"wanted a row for each of \['river stone'\]"),
        ("generations", '[{"prompt": "river stone"}]', r"wanted a row for each of \['river stone'\]"),
        ("generations", "7", r"wanted a row for each of \['river stone'\]"),
    ],
)
def test_damaged_dense_results_are_named_with_what_to_do(root, name, content, message):
    (root / f"results/dense/details/{name}.json").write_text(content)
    with pytest.raises(ComparisonError, match=rf"results/dense/details/{name}\.json: {message}.*python -m stages.evaluate part=dense"):
        run("sparse")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found no rows"),
        ([{"row": number, "values": VALUES} for number in range(3)], "wanted 4 rows in order, each with acc and acc_norm"),
        ([{"row": number, "values": {"acc": 1.0}} for number in range(4)], "wanted 4 rows in order"),
        ([{"row": number, "values": {**VALUES, "acc": None}} for number in range(4)], "wanted 4 rows in order"),
        ([{"row": 0, "values": VALUES}] * 4, "wanted 4 rows in order"),
    ],
)
def test_damaged_samples_of_the_dense_model_are_named(root, rows, message):
    tiny.write_lines(root / "results/dense/details/samples-piqa.jsonl", rows)
    with pytest.raises(ComparisonError, match=f"samples-piqa.jsonl: {message}.*evaluate the dense model again"):
        run("sparse")


def test_missing_samples_of_the_dense_model_are_named(root):
    (root / "results/dense/details/samples-piqa.jsonl").unlink()
    with pytest.raises(ComparisonError, match=r"details/samples-piqa.jsonl: not found; evaluate the dense model again"):
        run("sparse")


def test_a_missing_file_of_the_dense_results_is_named(root):
    (root / "results/dense/details/windows.json").unlink()
    with pytest.raises(ComparisonError, match="results/dense/details/windows.json: not found"):
        run("sparse")


def test_a_delta_of_another_base_is_refused(root):
    manifest = root / "artifacts/sparse/delta.json"
    facts = read_json(manifest)
    facts["recipe"]["base"] = "0" * 64
    manifest.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="artifacts/sparse: a delta of base 000000000000, wanted one of base"):
        run("sparse")


@pytest.mark.parametrize("part", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("articles", [{"question": "a"}], 'articles.jsonl, line 1: found question, wanted "text"'),
        ("articles", [{"text": None}], 'articles.jsonl, line 1, "text": found null, wanted a string'),
        ("articles", [], "articles.jsonl: found no rows"),
        ("boolq", [BOOLQ[0], {"text": "a"}], 'boolq.jsonl, line 2: found text, wanted "passage"'),
        ("piqa", [PIQA[0], {**PIQA[1], "label": None}], 'piqa.jsonl, line 2, "label": found null, wanted 0 or 1'),
    ],
)
def test_text_that_cannot_be_scored_is_named_before_a_weight_is_read(root, part, name, rows, message):
    forbid_weights(root)
    tiny.write_lines(root / f"artifacts/text/evaluation/{name}.jsonl", rows)
    with pytest.raises(TextError, match=f"artifacts/text/evaluation/{message}"):
        run(part)


def test_a_token_of_the_corpus_beyond_the_embedding_is_named_before_a_weight_is_read(root, monkeypatch):
    forbid_weights(root)
    monkeypatch.setattr(setup, "embedding_rows", lambda base: 7)
    with pytest.raises(CheckpointError, match="evaluation.corpora.articles: found the token .* with id .*, wanted ids below 7"):
        run("dense")


def test_a_corpus_of_empty_texts_is_too_small(root):
    tiny.write_lines(root / "artifacts/text/evaluation/articles.jsonl", [{"text": ""}])
    with pytest.raises(ConfigError, match="evaluation.corpora.articles: the corpus has 0 tokens, wanted 4 windows of 64"):
        run("dense")


def test_weights_that_are_not_finite_are_refused(root):
    """What the tests above rely on."""
    forbid_weights(root)
    with pytest.raises(CheckpointError, match="found NaN or infinity"):
        run("dense")


def test_a_streamed_evaluation_is_compared_with_a_streamed_one(root):
    streamed = replace(EVALUATION, streamed=True, generations=Generations(new_tokens=3, prompts=[]))
    with pytest.raises(ComparisonError, match=r"prompts: \['river stone'\] against \[\]"):
        run("sparse", streamed)
    run("dense", streamed)
    run("sparse", streamed)
    assert read_json(root / "results/sparse/details/generations.json") == []


def ruler(asked: Evaluation, *types: str) -> list[dict[str, Any]]:
    """The measurements of quantised models."""
    evaluate_quantised.main.function(evaluation=asked, ruler=Ruler(types=list(types), tasks=True))
    return read_json(Path("results/ruler/measurements.json"))


def test_quantised_models_are_a_ruler_with_their_bytes(root):
    evaluate_quantised.main.function(evaluation=EVALUATION, ruler=Ruler(types=["Q6_K", "Q3_K"], tasks=False))
    rows = read_json(root / "results/ruler/measurements.json")
    size = {row["type"]: row["bytes_per_weight"] for row in rows}
    assert 18 / 32 < size["Q3_K"] < size["Q6_K"]  # rows of 32 and 112 weights: Q4_0 or Q8_0, and F16
    divergence = {row["type"]: row["value"] for row in rows if row["metric"] == "mean_kld"}
    assert 0 < divergence["Q6_K"] < divergence["Q3_K"]
    perplexity = read_json(root / "results/dense/metrics.json")["corpora"]["articles"]["perplexity"]
    assert all(row["dense"] == pytest.approx(perplexity) for row in rows if row["metric"] == "perplexity")
    assert {row["kind"] for row in rows} == {"corpus"}


@pytest.mark.parametrize("streamed", [False, True])
def test_quantised_models_answer_the_tasks_each_for_itself(root, streamed):
    asked = replace(EVALUATION, streamed=streamed, generations=Generations(new_tokens=3, prompts=[]))
    run("dense", asked)
    expected = ruler(asked, "Q3_K")
    both = ruler(asked, "Q6_K", "Q3_K")
    assert {row["metric"] for row in expected if row["kind"] == "task"} == {"acc", "acc_norm"}
    assert all(row["difference"] is not None for row in expected if row["kind"] in ("task", "mean"))
    assert [row for row in both if row["type"] == "Q3_K"] == expected
    assert not list((root / "artifacts").glob(".evaluate-*"))


def test_a_ruler_goes_on_after_a_failure(root, monkeypatch):
    """What one type was scored to is not lost by the failure of the next."""
    expected = ruler(EVALUATION, "Q6_K", "Q3_K")
    asked = running.ask_all

    def fail_later(*arguments):
        if len(list((root / "artifacts/.evaluate-Q6_K").glob("answers-*"))) == len(EVALUATION.tasks):
            raise KeyboardInterrupt
        asked(*arguments)

    monkeypatch.setattr(running, "ask_all", fail_later)
    with pytest.raises(KeyboardInterrupt):
        ruler(EVALUATION, "Q6_K", "Q3_K")
    monkeypatch.setattr(running, "ask_all", asked)
    monkeypatch.setattr(running, "observe", None)  # nothing is observed again
    assert ruler(EVALUATION, "Q6_K", "Q3_K") == expected


def test_a_ruler_without_types_reads_no_weights(root):
    forbid_weights(root)
    evaluate_quantised.main.function(evaluation=EVALUATION, ruler=Ruler(types=[], tasks=True))
    assert read_json(root / "results/ruler/measurements.json") == []


def test_a_ruler_is_held_to_the_dense_models_protocol(root):
    with pytest.raises(ComparisonError, match="results/dense and this evaluation are not of the same protocol"):
        evaluate_quantised.main.function(evaluation=replace(EVALUATION, rows=3), ruler=Ruler(types=["Q3_K"], tasks=True))
