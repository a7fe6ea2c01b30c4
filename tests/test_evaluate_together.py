"""The benchmark of points that are evaluated side by side: its table. That results are the same is a test of the pipeline."""

from benchmarks import evaluate_together
from stages.files import read_json
from tests.project import ROOT

ROW = {"dense": 9.0, "alone": [10.0] * 5, "together": 30.0, "completing": [2.0] * 5}


def test_a_line_says_what_is_left_of_the_time_of_each_alone():
    text = evaluate_together.table(
        {"base": "b", "machine": "m", "overrides": ["evaluation=sweep"], "rows": [ROW, {**ROW, "together": 15.0}]}
    )
    whole, streamed = (line for line in text.splitlines() if " s | " in line)
    assert whole == "| whole, one after the other | 50 s | 30 s | 10 s | 0.80 |"
    assert streamed.endswith("| 50 s | 15 s | 10 s | 0.50 |")


def test_the_table_is_that_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_json(evaluate_together.RESULTS) if evaluate_together.RESULTS.is_file() else None
    text = evaluate_together.DOCUMENT.read_text(encoding="utf8")
    assert text.split(evaluate_together.START)[1].split(evaluate_together.END)[0].strip() == evaluate_together.table(found)
