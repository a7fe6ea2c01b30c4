"""The plots: specifications that Vega-Lite takes, with data under the names that the page gives."""

import json

import pytest
import vl_convert

from stages.experiments.page import charts
from tests.experiments import synthetic

GROUP = synthetic.group(sparsities=(0.5,))
METRIC = GROUP.metrics[0]
SPECS = {
    "frontier": charts.frontier(METRIC, GROUP.methods, GROUP.patterns),
    "seconds": charts.cost(METRIC, charts.SECONDS, GROUP.methods, GROUP.patterns),
    "tasks": charts.tasks(),
    "damping": charts.matrices("damping"),
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("frontier", {charts.POINTS, charts.REFERENCES}),
        ("seconds", {charts.POINTS}),
        ("tasks", {charts.TASKS}),
        ("damping", {charts.MATRICES}),
    ],
)
def test_a_plot_reads_the_data_of_these_names(name, data):
    compiled = vl_convert.vegalite_to_vega({**SPECS[name], "width": 300})
    named = {source["name"] for source in compiled["data"]}
    assert data <= named
    assert "config" not in SPECS[name]  # the page and the files have themes of their own


def test_an_axis_says_what_is_better():
    assert "perplexity on wikipedia, lower is better" in json.dumps(SPECS["frontier"])
    assert METRIC.axis == "perplexity on wikipedia, lower is better"
    assert GROUP.metrics[1].axis == "Mean KLD on wikipedia [nats], lower is better"


@pytest.mark.parametrize(("labels", "columns"), [(["a", "b"], 5), (["a" * 40], 2), (["a" * 200], 1)])
def test_a_legend_has_as_many_columns_as_fit(labels, columns):
    spec = json.dumps(charts.frontier(METRIC, labels, ["2:4"]))
    assert f'"columns": {columns}' in spec


def test_both_themes_tell_as_many_methods_apart():
    assert len(set(charts.LIGHT)) == len(set(charts.DARK)) == len(charts.LIGHT)
    assert charts.theme(dark=True)["range"] != charts.theme(dark=False)["range"]
