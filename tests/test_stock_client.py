"""A release loads and scores in stock libraries, in a process that cannot import sparsesweep."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.stock_client import StockScores, compared, isolated, largest_difference, of_task, scored, table
from stages.checkpoint.model import load_model
from stages.errors import ComparisonError
from stages.evaluation.harness import WholeModel
from stages.evaluation.questions import embedded_source
from stages.evaluation.tasks import TASKS
from stages.release.packing import pack
from tests import tiny
from tests.evaluation import asking
from tests.project import ROOT
from tests.release.llama_cpp.models import pruned

LOGITS = """
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("river stone lamp", return_tensors="pt")
with torch.no_grad():
    numpy.save(sys.argv[2], model(**tokens).logits.numpy())
"""
ROWS = [
    {"question_id": str(number), "goal": goal, "sol1": "river stone", "sol2": "lamp winter garden", "label": number % 2}
    for number, goal in enumerate(tiny.sentences(12, seed=3, length=9))
]


@pytest.fixture()
def release(base, tmp_path):
    """The release of a random delta, and the delta."""
    delta = pruned(tmp_path, base)
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    return tmp_path / "release", delta


def test_a_process_that_can_import_the_package_is_refused(monkeypatch):
    isolated("")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(ROOT))
    with pytest.raises(SystemExit, match="found the package stages, wanted a process that cannot import it"):
        isolated("")


def test_stock_transformers_computes_the_logits_of_base_and_delta(base, release, tmp_path):
    directory, delta = release
    isolated(LOGITS, directory, tmp_path / "logits.npy")
    tokens = AutoTokenizer.from_pretrained(directory)("river stone lamp", return_tensors="pt")
    ours = load_model(base, delta.apply, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), ours(**tokens).logits.numpy(), rtol=0, atol=1e-5)


def test_lm_evals_command_scores_a_release_as_our_evaluation_does(base, release, tmp_path):
    directory, delta = release
    (tmp_path / "ours").mkdir()
    model = load_model(base, delta.apply, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = WholeModel(tiny.NO_BOS, pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=512)
    rows = asking.samples(whole, {"piqa": ROWS}, tmp_path / "ours", tokenizer=tokenizer)["piqa"]
    source = embedded_source(TASKS["piqa"], ROWS, [], few_shot=0, sha256="", scratch=tmp_path)
    theirs = scored(directory, [source], tmp_path)["piqa"]
    ours = [row | {"scores": [list(score) for score in row["scores"]]} for row in rows]
    assert 0 < sum(row["values"]["acc"] for row in rows) < len(rows)
    assert {len(row) for row in theirs.likelihoods} == {2}
    for row, likelihoods in zip(ours, theirs.likelihoods, strict=True):
        assert likelihoods == pytest.approx([likelihood for likelihood, _ in row["scores"]], rel=0, abs=1e-4)
    compared_rows = of_task("piqa", ours, theirs)
    assert [row["metric"] for row in compared_rows] == ["acc", "acc_norm"]
    assert all(row["stock"] == pytest.approx(row["ours"], abs=1e-4) and row["apart"] < 1e-4 for row in compared_rows)


def test_the_largest_difference_is_of_any_continuation_and_other_rows_are_refused():
    assert largest_difference("piqa", [[-1.0, -2.0], [-3.0]], [[-1.0, -2.5], [-3.25]]) == 0.5
    with pytest.raises(ComparisonError, match="piqa: found 1 rows by lm-eval's command, wanted 2 with as many continuations each"):
        largest_difference("piqa", [[-1.0], [-3.0]], [[-1.0]])


def test_the_table_has_every_metric_and_the_largest_difference():
    rows = [{"values": {"acc": 1.0, "acc_norm": 0.0, "f1": 1.0}, "scores": [[-1.0, False], [-2.0, False]]}]
    scores = of_task("piqa", rows, StockScores(metrics={"acc": 1.0, "acc_norm": 0.0}, likelihoods=[[-1.0, -2.25]]))
    text = table({"model": "org/a", "rows": 1, "scores": scores, "versions": {"torch": "2"}})
    assert "| piqa | 1 | acc | 1.000000 | 1.000000 | 2.5e-01 |\n| piqa | 1 | acc_norm | 0.000000 | 0.000000 | 2.5e-01 |\n" in text


def test_another_score_is_refused():
    with pytest.raises(ComparisonError, match="piqa, acc: found 0.5 by lm-eval's command, wanted 0.501 as in results/sparse"):
        compared("piqa", "acc", 0.501, 0.5)
