"""The benchmark of kept statistics, on a small checkpoint."""

import shutil

from benchmarks import kept_statistics
from stages.files import BASE
from tests.project import ROOT
from tests.pruning.test_journal import draw_windows


def test_points_are_measured_both_ways_and_their_table_says_how_many(canonical, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(canonical, BASE)
    draw_windows()
    monkeypatch.setattr(kept_statistics, "SPARSITIES", [0.5, 0.6])
    row = kept_statistics.measurement(tmp_path / "scratch", [], [0.5])
    assert (row["windows"], row["length"], len(row["alone"]), len(row["kept"])) == (5, 24, 1, 2)
    assert row["bytes"] > 3 * 2 * 48 * 32 * 4  # of three blocks the samples of at least two inputs
    text = kept_statistics.table([row])
    (line,) = [line for line in text.splitlines() if line.startswith("| 5 x 24 tokens")]
    assert " | not measured | " in line
    assert f" | {(row['observing'] + sum(point['process'] for point in row['kept'])) / row['alone'][0]['process']:.2f} | " in line


def test_the_table_is_that_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = kept_statistics.read_json(kept_statistics.RESULTS) if kept_statistics.RESULTS.is_file() else []
    text = kept_statistics.DOCUMENT.read_text(encoding="utf8")
    assert text.split(kept_statistics.START)[1].split(kept_statistics.END)[0].strip() == kept_statistics.table(rows).strip()
