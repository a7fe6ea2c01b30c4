"""The table of experiments: what may be compared, in order."""

from dataclasses import replace

from stages.evaluation.measurement import Difference, Kind, Measurement
from stages.experiments.reading import Experiment, Missing
from stages.experiments.table import by_protocol, repeated, text

PROTOCOL = {
    "base": "f" * 64,
    "bos": None,
    "corpora": {"news": {"window_length": 128, "windows": 4, "tokens": 512, "available": 30}},
    "tasks": {"boolq": {"rows": 20, "available": 3270}, "piqa": {"rows": 20}},
    "evaluation": {},
    "delta": "d",
}


def measured(metric: str, value: float, **facts: object) -> Measurement:
    of = {"kind": Kind.CORPUS, "name": "news", "label": metric, "count": 8, "counted": "tokens", "clusters": 2}
    return Measurement(**{**of, "metric": metric, "value": value, **facts})


def experiment(name: str, perplexity: float, seed: int = 0, method: str = "wanda", **protocol: object) -> Experiment:
    return Experiment(
        name=name,
        revision="abc",
        params={"base": {"source": "hub", "repo": "org/model"}, "calibration": {"seed": seed}, "method": {"name": method}},
        measurements=[
            measured("perplexity", perplexity, stderr=1.0, dense=10.0),
            measured("perplexity_ratio", perplexity / 10),
            measured("mean_kld", 0.5, stderr=0.125, unit="nats"),
            measured("accuracy", 0.4, kind=Kind.MEAN, name="tasks", stderr=0.03, difference=Difference(value=-0.02)),
        ],
        prune_metrics={"sparsity": 0.5, "seconds": 61.2},
        protocol={**PROTOCOL, "delta": name, **protocol},
        method=method,
        pattern="2:4",
    )


def test_experiments_of_one_protocol_stand_in_one_table_best_first():
    shown = text([experiment("worse", 30.0), experiment("better", 20.0)], [], commands=False)
    title, _, header, _, *rows = shown.rstrip().split("\n")
    texts = "scored on news, 512 tokens in windows of 128, 4 of 30 windows, none begun with BOS"
    accuracy = "accuracy: the mean over tasks, every task alike; tasks, with their rows: boolq (20 of 3270), piqa (20)"
    assert title == f"org/model; {texts}; {accuracy}; the dense model has 10.00"
    assert header.split() == [
        "experiment",
        "method",
        "pattern",
        "sparsity",
        "perplexity",
        "over",
        "dense",
        "mean",
        "KLD",
        "accuracy",
        "against",
        "dense",
        "seconds",
    ]
    assert [row.split()[0] for row in rows] == ["better", "worse"]
    assert rows[0].split()[1:] == [
        "wanda",
        "2:4",
        "0.5",
        "20.00",
        "±",
        "1.00",
        "2.000",
        "0.500",
        "±",
        "0.125",
        "0.400",
        "±",
        "0.030",
        "-0.020",
        "61",
    ]


def test_the_dense_model_has_its_error_where_that_can_be_read():
    dense = replace(experiment("a", 20.0), dense=[measured("perplexity", 10.0, stderr=0.5)])
    assert text([dense], [], commands=False).splitlines()[0].endswith("; the dense model has 10.00 ± 0.50")


def test_columns_are_of_the_first_corpus_and_others_are_named():
    corpora = {**PROTOCOL["corpora"], "wiki": PROTOCOL["corpora"]["news"], "chat": PROTOCOL["corpora"]["news"]}
    title = text([experiment("a", 20.0, corpora=corpora)], [], commands=False).splitlines()[0]
    scored = "scored on news, 512 tokens in windows of 128, 4 of 30 windows, none begun with BOS"
    assert f"{scored} (make compare has wiki and chat, too); " in title


def test_experiments_of_another_protocol_stand_apart_with_the_reason():
    shown = text([experiment("a", 20.0, bos=1), experiment("b", 30.0), experiment("c", 40.0)], [], commands=False)
    assert (
        shown.index("\nb ")
        < shown.index("\nc ")
        < shown.index("not comparable with the first table: bos 1, there None")
        < shown.index("\na ")
    )


def test_a_result_that_several_experiments_have_stands_once():
    twice = [experiment("new", 20.0), experiment("old", 20.0)]
    assert [[one.name for one in group] for group in by_protocol(twice)] == [["new"]]
    first, second = twice
    again = replace(first, params={**first.params, "publish": {"frontier": "a hash"}})
    assert [[one.name for one in group] for group in by_protocol([again, second])] == [["new"]]


def test_an_experiment_whose_result_another_stands_for_is_named():
    new, old = experiment("new", 20.0), experiment("old", 20.0)
    workspace = replace(new, name="workspace", revision=None)
    assert repeated([new, old, workspace]) == [Missing(name="old", reason="its result is that of new")]
    assert "left out old: its result is that of new\n" in text([new, old], [])


def test_the_workspace_is_its_own_experiment_whatever_the_order_of_its_keys():
    first = experiment("first", 20.0)
    turned = {name: dict(reversed(section.items())) for name, section in reversed(first.params.items())}
    assert by_protocol([first, replace(first, name="workspace", revision=None, params=turned)]) == [[first]]


def test_what_is_left_out_is_named_with_the_reason():
    assert text([], [Missing(name="gone", reason="why")], commands=True).split("\n") == [
        "no experiment was evaluated yet; `dvc exp run` runs one",
        "",
        "left out gone: why",
        "",
    ]


def test_a_row_says_how_to_get_it_where_no_line_composes_it():
    assert "(conf/ composes it no more; dvc exp apply a)" in text([experiment("a", 20.0)], [], commands=True)


REPEATED = [experiment("c", 40.0, method="ria"), experiment("a", 20.0), experiment("b", 24.0, seed=1)]


def test_repeats_by_calibration_seed_are_named_below_the_table():
    *_, last = text(REPEATED, []).rstrip().split("\n")
    assert last == (
        "repeats of one setting, mean ± standard deviation between 2 calibration seeds: a (seed 0), b (seed 1): "
        "perplexity 21.91 ± 2.82, mean KLD 0.500 ± 0.000, accuracy 0.400 ± 0.000"
    )
    assert "repeats" not in text(REPEATED[:2], [])


def test_settings_stand_in_one_row_best_first_and_one_seed_has_no_spread():
    _, _, header, _, first, second, _, note = text(REPEATED, [], seeds=True).rstrip().split("\n")
    assert header.split()[:5] == ["method", "pattern", "sparsity", "seeds", "perplexity"]
    assert " ".join(first.split()) == (
        "wanda 2:4 0.5 2 21.91 ± 2.82 2.191 ± 0.282 0.500 ± 0.000 0.400 ± 0.000 -0.020 ± 0.000 61"
    )  # 2.82 = sqrt(480) * ln(1.2) / sqrt(2)
    assert " ".join(second.split()) == "ria 2:4 0.5 1 40.00 4.000 0.500 0.400 -0.020 61"
    assert note.startswith("mean ± standard deviation between calibration seeds")


def test_a_setting_has_no_spread_of_what_one_seed_lacks():
    lacking = experiment("b", 24.0, seed=1)
    lacking.measurements.clear()
    row = text([REPEATED[1], lacking], [], seeds=True).split("\n")[4]
    assert row.split() == ["wanda", "2:4", "0.5", "2", "61"]
