"""What the page says of repeats by calibration seed."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from stages.experiments.page import charts
from stages.experiments.page.content import group_content
from stages.experiments.page.repeats import (
    between_settings,
    repeat_difference_rows,
    repeat_rows,
    repeated,
    said_of_single,
    settings_of,
    spread_words,
)
from stages.experiments.page.writing import html
from stages.experiments.repeats import spread
from tests.experiments import synthetic

GROUP, ONCE = synthetic.repeated_group(), synthetic.group(sparsities=(0.5,))
PERPLEXITY, KLD, ACCURACY = GROUP.metrics


def text_of(page: str) -> str:
    """The section of a page, without tags."""
    section = re.search(r'<section aria-labelledby="repeats-title".*?</section>', page, re.S)[0]
    return " ".join(re.sub(r"<[^>]*>", " ", section).split())


def values(name: str) -> list[float]:
    return [PERPLEXITY.of(details)["value"] for details in GROUP.results if details.name.startswith(f"{name}-seed")]


def test_settings_stand_by_pattern_and_sparsity():
    assert {asked: [(one.name, len(one.repeats)) for one in members] for asked, members in settings_of(GROUP).items()} == {
        "unstructured 50%": [("wanda", 3), ("sparsegpt", 3), ("ria", 1)],
        "2:4": [("wanda", 3)],
    }
    assert repeated(GROUP)[0].experiments == "0 (wanda-seed0), 1 (wanda-seed1), 2 (wanda-seed2)"


def test_settings_of_one_method_are_called_by_their_first_experiment():
    other = synthetic.details("longer", "wanda", "unstructured", GROUP.dense)
    other.experiment.params["calibration"]["windows"] = 128
    names = [one.name for one in settings_of(replace(GROUP, results=[*GROUP.results, other]))["unstructured 50%"]]
    assert names == ["wanda (wanda-seed0)", "sparsegpt", "ria", "wanda (longer)"]


def test_a_metric_is_written_with_its_spread_and_apart_from_it_the_error_over_text():
    of = spread([31.2, 30.1, 33.9], [0.5, 0.7, 0.6], is_ratio=False)
    assert spread_words(PERPLEXITY, of) == ("31.73 ± 1.96", " [26.88, 36.59]", "± 0.60 over text")
    assert spread_words(PERPLEXITY, spread([31.2], [None], is_ratio=False)) == ("31.20", "", "")


def test_a_metric_that_a_seed_lacks_has_no_spread():
    first, *rest = repeated(GROUP)[0].repeats
    lacking = replace(first, measurements=[row for row in first.measurements if row["metric"] != "mean_kld"])
    setting = replace(repeated(GROUP)[0], repeats=[lacking, *rest])
    assert setting.spread(KLD) is None
    assert setting.spread(PERPLEXITY).seeds == 3


def test_settings_are_told_apart_where_both_have_seeds():
    unstructured, *others = between_settings(GROUP, PERPLEXITY)
    assert others == []
    assert (unstructured.asked, unstructured.pairs, unstructured.too_few) == ("unstructured 50%", 3, 2)
    (words,) = unstructured.exceeding + unstructured.within
    wanted = ttest_rel(np.log(values("wanda")), np.log(values("sparsegpt")))
    low, high = np.exp(wanted.confidence_interval(0.95))
    ratio = math.exp(np.log(values("wanda")).mean() - np.log(values("sparsegpt")).mean())
    assert words == f"wanda against sparsegpt: ×{ratio:.3f} [{low:.3f}, {high:.3f}] (paired t)"
    assert bool(unstructured.exceeding) == (wanted.pvalue < 0.05)


def test_settings_of_other_seeds_are_not_paired():
    results = [details for details in GROUP.results if details.name != "wanda-seed2"]
    unstructured, *_ = between_settings(replace(GROUP, results=results), PERPLEXITY)
    wanted = ttest_ind(np.log(values("wanda")[:2]), np.log(values("sparsegpt")), equal_var=False)
    low, high = np.exp(wanted.confidence_interval(0.95))
    (words,) = unstructured.exceeding + unstructured.within
    assert words.endswith(f" [{low:.3f}, {high:.3f}] (Welch's t)")


def test_rows_have_every_metric_that_was_measured():
    measured = {f"{row['kind']}/{row['name']}/{row['metric']}" for row in GROUP.results[0].measurements}
    assert {row["metric"] for row in repeat_rows(GROUP)} == measured
    assert len(measured) > len(GROUP.metrics)
    sizes = [row for row in repeat_difference_rows(GROUP) if row["metric"].startswith("size/") and "value" in row]
    assert {row["verdict"] for row in sizes} <= {"within noise", "unknown"}


def test_equal_settings_differ_within_the_spread_between_seeds():
    twins = [
        replace(one, experiment=replace(one.experiment, method="twin", params={**one.experiment.params, "allocation": {"name": "owl"}}))
        for one in GROUP.results[:3]
    ]
    (between,) = between_settings(replace(GROUP, results=[*GROUP.results[:3], *twins]), ACCURACY)
    assert (between.exceeding, len(between.within), between.too_few) == ([], 1, 0)


def test_without_repeats_nothing_is_said_of_pairs():
    assert repeated(ONCE) == between_settings(ONCE, PERPLEXITY) == []
    assert said_of_single(ONCE).startswith("Every setting has one seed: of the spread between seeds nothing is known there.")
    assert said_of_single(GROUP).startswith("1 of 4 settings has one seed: ")
    assert said_of_single(replace(GROUP, results=GROUP.results[:-1])) == "Every setting has several seeds."


def test_rows_hold_the_spread_and_leave_it_empty_of_one_seed():
    rows = [row for row in repeat_rows(GROUP) if row["metric"] == PERPLEXITY.id]
    assert [(row["setting"], row["pattern"], row["seeds"]) for row in rows] == [
        ("wanda", "unstructured", 3),
        ("sparsegpt", "unstructured", 3),
        ("ria", "unstructured", 1),
        ("wanda", "2:4", 3),
    ]
    assert rows[0]["mean"] == pytest.approx(math.exp(np.log(values("wanda")).mean()))
    assert rows[0]["sd_between_seeds"] == pytest.approx(rows[0]["mean"] * np.log(values("wanda")).std(ddof=1))
    assert rows[0]["low"] < rows[0]["mean"] < rows[0]["high"]
    assert (rows[2]["sd_between_seeds"], rows[2]["low"], rows[2]["stderr_over_text"] > 0) == (None, None, True)


def test_rows_of_differences_say_where_seeds_are_too_few():
    rows = [row for row in repeat_difference_rows(GROUP) if row["metric"] == PERPLEXITY.id]
    assert [row["verdict"] for row in rows if "ria" in (row["setting"], row["against"])] == ["too few seeds"] * 2
    (told,) = [row for row in rows if "value" in row]
    assert (told["setting"], told["against"], told["is"], told["seeds"], told["test"]) == ("wanda", "sparsegpt", "ratio", 3, "paired t")


def test_the_page_has_a_table_and_words():
    shown = text_of(html([GROUP], []))
    assert "3: 0 (wanda-seed0), 1 (wanda-seed1), 2 (wanda-seed2)" in shown
    assert "over text" in shown
    assert "1 of 4 settings has one seed" in shown
    assert "2 of 3 pairs: too few seeds, wanted two or more of both settings." in shown
    assert "Settings with more than one calibration seed" not in text_of(html([ONCE], []))


def test_points_and_rows_are_told_apart_by_their_seed():
    content = group_content(GROUP)
    assert [one["seed"] for one in content["experiments"][:4]] == [0, 1, 2, 0]
    points = content["metrics"][0]["points"]
    assert [row[points["keys"].index("seed")] for row in points["rows"][:3]] == [0, 1, 2]
    assert "calibration seed" in str(charts.frontier(PERPLEXITY, GROUP.methods, GROUP.patterns))
