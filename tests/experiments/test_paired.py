"""Differences of two models on the same windows and rows."""

import math

import pytest

from stages.evaluation.statistics import Estimate, difference_interval, mean_of_independent, mean_of_rows
from stages.experiments.details import Scores
from stages.experiments.paired import Metric, Verdict, apart, headline, natural, of_scores, others, verdict
from tests.experiments import synthetic


def metric(kind: str = "corpus", name: str = "news", what: str = "perplexity", better: str = "lower") -> Metric:
    kept = {"perplexity": "nll", "mean_kld": "kld"}.get(what)
    return Metric(kind=kind, name=name, metric=what, label=what, unit="", better=better, kept=kept, is_ratio=what == "perplexity")


def scores(nll: list[float], kld: list[float] | None = None, acc: list[float] | None = None) -> Scores:
    windows = {"nll": nll} | ({"kld": kld} if kld else {})
    rows = {"boolq": {"acc": acc}} if acc else {}
    return Scores(
        windows={"news": windows}, rows=rows, window_clusters={"news": list(range(len(nll)))}, row_clusters={"boolq": [0, 0, 1, 1]}
    )


def test_a_difference_of_perplexity_is_a_ratio():
    found = apart(metric(), scores([2.0, 3.0, 4.0]), scores([1.0, 2.0, 3.0]))
    value, ends = natural(metric(), found)
    assert value == pytest.approx(math.e)
    assert ends == pytest.approx((math.e, math.e))


def test_a_difference_of_other_metrics_is_a_difference():
    kld = metric(what="mean_kld")
    assert natural(kld, apart(kld, scores([0, 0], [0.3, 0.5]), scores([0, 0], [0.1, 0.1])))[0] == pytest.approx(0.3)
    acc = metric("task", "boolq", "acc", "higher")
    found = apart(acc, scores([0], acc=[1, 1, 0, 0]), scores([0], acc=[0, 0, 0, 0]))
    assert (found.value, found.count, found.clusters) == (0.5, 4, 2)


def of_parts(acc: list[float]) -> Scores:
    """A group of two tasks that weigh alike, of 6 rows and of 2."""
    return Scores(
        windows={},
        rows={"g": {"acc": acc}},
        window_clusters={},
        row_clusters={"g": [0, 0, 1, 2, 3, 4, 5, 6]},
        parts={"g": {"acc": [0] * 6 + [1] * 2}},
    )


def test_a_group_that_weighs_its_tasks_alike_is_the_mean_over_its_tasks():
    found = apart(metric("task", "g", "acc", "higher"), of_parts([1] * 6 + [0, 0]), of_parts([0] * 6 + [1, 1]))
    assert found.value == 0.0  # of all rows it would be 0.5
    own = of_scores(metric("task", "g", "acc", "higher"), of_parts([1] * 6 + [0, 0]))
    assert own.value == 0.5


def test_a_models_own_accuracies_have_the_intervals_of_the_evaluation():
    dense = synthetic.dense_scores()
    wanted = [mean_of_rows(of["acc"], dense.row_clusters[task]) for task, of in dense.rows.items()]
    metric = next(one for one in headline(synthetic.group().results) if one.kind == "mean")
    found = of_scores(metric, dense)
    assert (found.value, found.interval) == (
        pytest.approx(mean_of_independent(wanted).value),
        pytest.approx(mean_of_independent(wanted).interval),
    )


def test_what_one_of_two_lacks_has_no_difference():
    assert apart(metric(what="mean_kld"), scores([1.0], [0.1]), scores([1.0])) is None
    assert apart(metric("task", "boolq", "acc"), scores([1.0]), scores([1.0], acc=[0, 0, 0, 0])) is None
    assert apart(metric("mean", "tasks", "acc"), scores([1.0]), scores([1.0])) is None


def test_rows_that_all_agree_have_an_interval_of_the_evaluations_kind():
    acc = metric("task", "boolq", "acc", "higher")
    found = apart(acc, scores([0], acc=[1, 1, 0, 0]), scores([0], acc=[1, 1, 0, 0]))
    assert (found.value, found.stderr) == (0.0, 0.0)
    assert found.interval == difference_interval([1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1])
    assert found.interval[0] < 0 < found.interval[1]


@pytest.mark.parametrize(
    ("value", "better", "said"),
    [(0.5, "lower", Verdict.WORSE), (0.5, "higher", Verdict.BETTER), (-0.5, "lower", Verdict.BETTER), (0.1, "lower", Verdict.NOISE)],
)
def test_a_difference_is_one_where_its_interval_holds_no_zero(value, better, said):
    assert verdict(metric(better=better), Estimate(value=value, stderr=0.1, count=30, clusters=30)) == said


def test_without_an_interval_it_is_unknown_whether_a_difference_is_one():
    assert verdict(metric(), Estimate(value=9.0, stderr=None, count=1, clusters=1)) == Verdict.UNKNOWN


def test_a_models_own_mean_is_that_of_the_statistics():
    found = of_scores(metric(), scores([1.0, 3.0]))
    assert math.exp(found.value) == pytest.approx(math.exp(2))


def test_plots_show_each_corpus_first_and_means_last():
    assert [one.id for one in headline(synthetic.group().results)] == [
        "corpus/wikipedia/perplexity",
        "corpus/wikipedia/mean_kld",
        "mean/tasks/accuracy",
    ]


def test_what_is_shown_without_plots_is_told_apart_too():
    ratio, logarithm, top = others(synthetic.group().results)
    assert [one.metric for one in (ratio, logarithm, top)] == ["perplexity_ratio", "perplexity_ln_ratio", "same_top_p"]
    ours, theirs = synthetic.group().results[:2]
    factor, apart_in_ln = (apart(one, ours.scores, theirs.scores) for one in (ratio, logarithm))
    assert factor.value == apart_in_ln.value == apart(headline([ours])[0], ours.scores, theirs.scores).value
    found = apart(top, ours.scores, theirs.scores)
    wanted = top.of(ours)["value"] - top.of(theirs)["value"]  # in percent
    assert (found.value, top.digits) == (pytest.approx(wanted), 1)
