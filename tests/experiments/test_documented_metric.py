"""The metric of docs/extending.md is in the page, the terminal's table and the model card, and is named in no list."""

import re
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from stages.evaluation import metrics
from stages.evaluation.measurement import Measurement, as_rows
from stages.evaluation.metric import Corpus, Metric, Predictions, window_means
from stages.evaluation.metrics import METRICS
from stages.experiments.details import of_dense
from stages.experiments.page.content import group_content
from stages.experiments.page.group import Group
from stages.experiments.page.words import best
from stages.experiments.table import text
from stages.release.card import corpus_lines, metadata
from stages.schema import Table
from tests.experiments import synthetic
from tests.project import ROOT
from tests.release.test_card import RECORDS, VERIFIED, Delta

RIGHT_TOKENS = {"dense": 7, "wanda": 5, "sparsegpt": 6}  # of the 9 of a window that are found; in every second window 2 more


@pytest.fixture()
def documented(monkeypatch) -> Metric:
    (source,) = re.findall(r"```python\n(\"\"\"Next token.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    module = ModuleType("next_token")
    exec(compile(source, "docs/extending.md", "exec"), vars(module))
    monkeypatch.setattr(metrics, "METRICS", Table([*METRICS.values(), module.NEXT_TOKEN]))
    return module.NEXT_TOKEN


def observed(right: list[int]) -> torch.Tensor:
    """Of nine tokens of each window, whether they were found."""
    return torch.tensor([[float(token < count) for token in range(9)] for count in right])


def corpus() -> Corpus:
    windows = torch.zeros(synthetic.WINDOWS, 10, dtype=torch.int64)
    return Corpus(name="wikipedia", windows=windows, clusters=synthetic.dense_scores().window_clusters["wikipedia"])


def right_of(model: str) -> torch.Tensor:
    return observed([RIGHT_TOKENS[model] + 2 * (window % 2) for window in range(synthetic.WINDOWS)])


def measured(metric: Metric, model: str) -> Measurement:
    dense = None if model == "dense" else {"right": window_means(right_of("dense"))}
    (made,) = metric.measure(corpus(), {"right": right_of(model)}, dense)
    return made


@pytest.fixture()
def group(documented) -> Group:
    """Two experiments and their dense model, scored by it."""
    dense = synthetic.dense_scores()
    dense.windows["wikipedia"]["right"] = window_means(right_of("dense"))
    results = []
    for method in ("wanda", "sparsegpt"):
        details = synthetic.details(method, method, "unstructured", dense)
        details.scores.windows["wikipedia"]["right"] = window_means(right_of(method))
        made = measured(documented, method)
        details.experiment.measurements.append(made)
        details.measurements.extend(as_rows([made]))
        results.append(details)
    return Group(results=results, dense=of_dense(dense), differs={})


def test_it_finds_tokens_that_are_likeliest(documented):
    log_probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log()
    found = documented.observe(Predictions(tokens=torch.tensor([0, 1]), log_probabilities=log_probabilities, dense=None))
    assert found["right"].tolist() == [1.0, 0.0]
    made = measured(documented, "wanda")
    assert (made.value, made.dense, made.difference.value) == pytest.approx((6 / 9, 8 / 9, -2 / 9))


def test_it_has_plots_columns_and_differences_on_the_page(group):
    content = group_content(group)
    assert [one["metric"] for one in content["metrics"]] == ["perplexity", "mean_kld", "next_token", "accuracy"]
    new = content["metrics"][2]
    assert (new["kept"], new["digits"], new["ratio"], new["label"]) == ("right", 3, False, "next token right on wikipedia")
    assert [row[new["points"]["keys"].index("against_dense")] for row in new["points"]["rows"]] == [
        "-0.222 [-0.222, -0.222]",
        "-0.111 [-0.111, -0.111]",
    ]
    assert "next_token" in {row["metric"] for row in content["experiments"][0]["measurements"]}
    (dense,) = [row for row in content["dense"]["measurements"] if row["metric"] == "next_token"]
    assert dense["value"] == pytest.approx(8 / 9, abs=1e-6)
    (first,) = best(group, group.metrics[2])
    assert (first.name, first.value.split()[0]) == ("sparsegpt", "0.778")


def test_it_has_a_column_in_the_terminal(group):
    experiments = [details.experiment for details in group.results]
    for experiment in experiments:
        experiment.protocol["tasks"] = {}
        experiment.prune_metrics["sparsity"] = 0.5
    _, _, header, _, *rows = text(experiments, []).rstrip().split("\n")
    start = header.index("next token")
    assert {row.split()[0]: row[start:].split()[0] for row in rows} == {"wanda": "0.667", "sparsegpt": "0.778"}


def test_it_has_a_row_in_the_model_card_and_its_metadata(documented):
    dense, sparse = measured(documented, "dense"), measured(documented, "wanda")
    (line,) = corpus_lines("wikipedia", "the text", {dense.key: dense}, {sparse.key: sparse})
    assert line.startswith("| share of next tokens found, the text | 0.889 ± ")
    assert line.endswith("| -0.222 ± 0.000 [-0.222, -0.222] |")
    news = replace(sparse, name="news")
    card = metadata("small", Delta().recipe, RECORDS, VERIFIED, [*RECORDS.sparse, news])
    assert ("next_token", pytest.approx(0.6667)) in [(result.metric_type, result.metric_value) for result in card.eval_results]
