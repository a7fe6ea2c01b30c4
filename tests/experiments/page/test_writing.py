"""The page and the files beside it."""

import csv
import json
import re
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from stages.errors import SparsesweepError
from stages.experiments.details import of_dense
from stages.experiments.page import charts, writing
from stages.experiments.page.tables import write_tables
from stages.experiments.page.writing import html, plots, write
from stages.experiments.reading import Missing
from tests.experiments import synthetic

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def groups():
    return [synthetic.group(sparsities=(0.5, 0.6)), synthetic.other_group()]


@pytest.fixture(scope="module")
def page(groups) -> str:
    return html(groups, [Missing(name="<gone>", reason="why & where")])


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_loads_nothing(page):
    own = page.replace(writing.bundle(), "")
    assert not re.search(r"\b(src|href)\s*=\s*[\"']?(?!#|data:)[^\"'#]", own.split("<script")[0])
    addresses = set(re.findall(r"https?://[^\s\"'`)\\<]+", page))
    assert {address.split("/")[2] for address in addresses} <= {"www.w3.org", "vega.github.io", "github.com"}  # names of formats
    assert "@import" not in own
    assert "default-src 'none'" in page


def test_the_page_says_what_was_compared_on_what(page):
    text = " ".join(page.split())
    assert "<h1>org/small-model</h1>" in text
    assert "18,414 tokens of 7 documents, in the first 18 of 301 windows of 1,024 tokens, none begun with BOS" in text
    assert "Measured on 9 tasks, 60 rows each, the first of 3,270." in text
    assert "<code>bos</code>: 1, there absent" in text
    assert "<strong>&lt;gone&gt;</strong>: why &amp; where" in text


def test_the_page_says_which_rows_were_cut(groups):
    first = groups[0].results[0]
    tasks = {"boolq": {**first.experiment.protocol["tasks"]["boolq"], "cut": 3, "asked": 80}}
    cut = replace(first, experiment=replace(first.experiment, protocol={**first.experiment.protocol, "tasks": tasks}))
    shown = html([replace(groups[0], results=[cut])], [])
    assert "3 of 60 rows of boolq are longer than the model&#39;s context of 2,048 tokens and were cut on the left." in shown
    assert "boolq has 60 rows, where 80 were asked for; all of them are scored." in shown


def test_no_text_of_an_experiment_ends_the_script(groups):
    first = groups[0].results[0]
    row = {"prompt": "</script><b>", "raw_dense": "</script>", "raw_sparse": "<!-- <script>"}
    shown = html([replace(groups[0], results=[replace(first, generations=[row])])], [])
    assert data_of(shown)["groups"][0]["prompts"] == ["</script><b>"]
    assert shown.count("</script>") == 4


def test_every_row_has_its_lines(page):
    first = data_of(page)["groups"][0]["experiments"][0]
    assert (first["run"], first["apply"]) == (
        "dvc exp run -S method=wanda -S pattern.sparsity=0.5 -S calibration.seed=0",
        "dvc exp apply wanda-50",
    )


def test_the_page_of_two_hundred_experiments_is_small():
    dense = synthetic.dense_scores(rows=1000)
    methods = list(synthetic.METHODS)
    results = [
        synthetic.details(
            f"run-{number}", methods[number % 6], "unstructured", dense, sparsity=0.4 + number % 5 / 10, seed=number, blocks=32
        )
        for number in range(200)
    ]
    group = replace(synthetic.group(sparsities=(0.5,)), results=results, dense=of_dense(dense))
    assert len(html([group], []).encode()) < 5 * MEGABYTE


@pytest.fixture()
def few_plots(monkeypatch) -> None:
    """A test that writes files draws the first two plots."""
    monkeypatch.setattr(writing, "plots", lambda groups: list(plots(groups))[:2])


def test_files_lie_beside_the_page(groups, few_plots, tmp_path):
    write(tmp_path / "comparison", groups, [])
    files = {path.name: path for path in (tmp_path / "comparison").iterdir()}
    name = "frontier-corpus-wikipedia-perplexity-1"
    assert {"index.html", "experiments.csv", "measurements.csv", "differences.csv", "matrices.csv", f"{name}.png", f"{name}.svg"} <= set(
        files
    )
    assert files[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
    svg = files[f"{name}.svg"].read_text()
    assert svg.startswith("<svg") and "admm_short" in svg and "dense" in svg


def test_a_page_takes_the_place_of_a_page_and_of_nothing_else(groups, few_plots, tmp_path):
    write(tmp_path / "a", groups, [])
    write(tmp_path / "a", groups, [])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(SparsesweepError, match="thesis: found files that are no page of comparison, wanted a directory that is empty"):
        write(tmp_path / "thesis", groups, [])
    with pytest.raises(SparsesweepError, match=r"chapter.txt: found a file, wanted a directory"):
        write(tmp_path / "thesis/chapter.txt", groups, [])
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"


def test_every_plot_has_a_file(groups):
    names = [name for name, _ in plots(groups)]
    assert len(names) == len(set(names))
    for metric in ("corpus-wikipedia-perplexity", "corpus-wikipedia-mean_kld", "mean-tasks-accuracy"):
        assert {f"{plot}-{metric}-{number}" for plot in ("frontier", *charts.COSTS) for number in (1, 2)} <= set(names)
    assert {"accuracy-1", "accuracy-2", "matrices-admm-50-1"} <= set(names)


def test_tables_hold_every_number(groups, tmp_path):
    write_tables(tmp_path, groups)
    rows = {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in tmp_path.glob("*.csv")}
    assert len(rows["experiments"]) == 14
    assert rows["experiments"][0]["run"].startswith("dvc exp run -S method=wanda")
    first = rows["experiments"][0]
    assert [first[name] for name in ("weights", "dense_tokens_per_second", "sparse_tokens")] == ["69672960", "12.0", "240"]
    assert {row["protocol"] for row in rows["experiments"]} == {"1", "2"}
    assert len(rows["measurements"]) == sum(len(details.measurements) for group in groups for details in group.results)
    assert len(rows["matrices"]) == 14 * synthetic.BLOCKS * len(synthetic.MATRICES)
    worse = [row for row in rows["differences"] if row["experiment"] == "wanda-50" and row["against"] == "dense"]
    of_metric = {row["metric"]: row for row in worse}
    assert len(of_metric) == len(worse) > 3
    headlines = {"corpus/wikipedia/perplexity": "ratio", "corpus/wikipedia/mean_kld": "difference", "mean/tasks/accuracy": "difference"}
    assert {metric: of_metric[metric]["is"] for metric in headlines} == headlines
    first = of_metric["corpus/wikipedia/perplexity"]
    assert (first["verdict"], first["lost"]) == ("worse", "")
    (task, *_) = [row for metric, row in of_metric.items() if metric.startswith("task/")]
    lost, gained = int(task["lost"]), int(task["gained"])
    assert gained - lost == round(float(task["value"]) * int(task["count"]))
    assert float(task["p_value"]) == pytest.approx(binomtest(lost, lost + gained).pvalue)
    assert float(first["low"]) < float(first["value"]) < float(first["high"])
