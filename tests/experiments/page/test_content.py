"""The data that the page embeds."""

import base64
import json
from dataclasses import replace

import pytest
from scipy.stats import t

from stages.evaluation.statistics import mean_of_rows
from stages.experiments.page.content import (
    content,
    costs,
    dodged,
    front_marked,
    matrices_content,
    measured_costs,
    numbered,
    of_types,
    packed,
    points,
    quantiles,
    references,
)
from tests.experiments import synthetic

GROUP = synthetic.group(sparsities=(0.5,))


def test_rows_of_right_and_wrong_are_packed_into_bits():
    assert packed([1, 0, 0, 0, 0, 0, 0, 0, 1]) == {"bits": base64.b64encode(bytes([1, 1])).decode(), "count": 9}
    assert packed([0.12345678, 1]) == [0.123457, 1]


def test_clusters_are_numbered_and_only_counted_where_each_is_alone():
    assert numbered(["b", "a", "b"]) == [0, 1, 0]
    assert numbered([7, 5, 9]) == 3


@pytest.mark.parametrize(("better", "front"), [("lower", {"a", "c", "e"}), ("higher", {"b", "d", "e"})])
def test_the_pareto_front_is_what_nothing_sparser_beats(better, front):
    rows = [("a", 0.5, 1.0), ("b", 0.5, 5.0), ("c", 0.6, 2.0), ("d", 0.6, 4.0), ("e", 0.7, 3.0)]
    marked = front_marked([{"experiment": name, "sparsity": sparsity, "value": value} for name, sparsity, value in rows], better)
    assert {row["experiment"] for row in marked if row["front"]} == front


def test_every_point_has_its_interval_and_count():
    rows = points(GROUP, GROUP.metrics[0])
    assert len(rows) == 9
    assert rows[0]["low"] < rows[0]["value"] < rows[0]["high"]
    assert rows[0]["counted"] == "18,414 tokens in 7 documents"
    assert (rows[0]["asked"], rows[0]["seconds"] > 0) == ("unstructured 50%", True)


def test_every_column_says_what_it_is_measured_on():
    found = content([GROUP])["groups"][0]
    assert [metric["counted"] for metric in found["metrics"]] == [
        "18,414 tokens in 7 documents, the first 18 of 301 windows",
        "18,414 tokens in 7 documents, the first 18 of 301 windows",
        "9 tasks, 60 rows each, the first of 3,270",
    ]
    assert found["task_metrics"]["boolq"]["counted"] == "first 60 of 3,270 rows"


def test_the_dense_model_has_an_interval_in_each_task():
    rows = {row["name"]: row for row in content([GROUP])["groups"][0]["dense"]["measurements"] if row["kind"] == "task"}
    acc, clusters = GROUP.dense.rows["boolq"]["acc"], GROUP.dense.row_clusters["boolq"]
    assert set(rows) == set(synthetic.TASKS)
    assert (rows["boolq"]["low"], rows["boolq"]["high"]) == pytest.approx(mean_of_rows(acc, clusters).interval, abs=1e-6)


def test_points_of_one_sparsity_stand_side_by_side():
    rows = [{"experiment": name, "method": name, "pattern": "2:4", "sparsity": at} for name, at in (("a", 0.5), ("b", 0.501), ("c", 0.7))]
    assert [row["dodge"] for row in dodged(rows)] == [-3.5, 3.5, 0]


def test_lines_are_the_dense_model_and_the_ruler_with_labels_apart():
    lines = references(GROUP, GROUP.metrics[0])
    assert {line["label"] for line in lines} == {"dense", "Q8_0", "Q4_0", "Q2_K"}
    close = [line for line in lines if line["label"] in ("dense", "Q4_0")]
    assert len({(line["shift"], line["below"]) for line in close}) == 2
    assert [line["label"] for line in references(GROUP, GROUP.metrics[1])] == ["Q8_0", "Q4_0", "Q2_K"]
    assert {line["label"] for line in references(GROUP, GROUP.metrics[2])} == {"dense", "Q8_0", "Q4_0", "Q2_K"}
    counts = {line["label"]: line["counted"] for line in lines}
    assert counts["dense"] == "18,414 tokens in 7 documents, the first 18 of 301 windows"
    assert counts["Q4_0"] == "18,414 tokens in 7 documents"


def test_a_quantised_model_of_several_types_says_so():
    assert of_types("Q2_K", {"Q4_0": 0.75, "Q2_K": 0.25}) == "Q2_K (75% Q4_0)"
    assert of_types("Q8_0", {"Q8_0": 1.0}) == of_types("Q8_0", {}) == "Q8_0"


def test_matrices_are_told_by_block_and_kind():
    found = matrices_content(GROUP.results[0])
    assert found["kinds"] == list(synthetic.MATRICES)
    assert found["cells"][0] == [0, 0, 1]
    assert len(found["relative_error"]) == len(found["cells"]) == synthetic.BLOCKS * len(synthetic.MATRICES)
    assert found["sparsity"] == 0.5


def test_blocks_and_kinds_that_experiments_share_are_embedded_once():
    small = synthetic.details("a", "wanda", "unstructured", synthetic.dense_scores(), blocks=1)
    found = content([replace(GROUP, results=[*GROUP.results, small])])["groups"][0]
    assert [one["matrices"]["layout"] for one in found["experiments"]] == [0] * 9 + [1]
    assert [len(layout["cells"]) for layout in found["layouts"]] == [synthetic.BLOCKS * len(synthetic.MATRICES), len(synthetic.MATRICES)]
    assert not {"kinds", "cells"} & set(found["experiments"][0]["matrices"])


def test_experts_stand_as_their_mean():
    details = GROUP.results[0]
    rows = [{**details.matrices[0], "matrix": f"m.layers.0.mlp.experts.{number}.up", "damping": number / 10} for number in range(2)]
    details = synthetic.details("a", "wanda", "unstructured", synthetic.dense_scores(rows=3), blocks=1)
    details.matrices[:] = rows
    assert matrices_content(details) | {"relative_error": None, "relative_error_held_out": None, "sparsity": None} == {
        "kinds": ["up"],
        "tokens": [16384, 16384],
        "error_tokens": 256,
        "cells": [[0, 0, 2]],
        "relative_error": None,
        "relative_error_held_out": None,
        "sparsity": None,
        "damping": 0.05,
    }
    details.matrices[0]["damping"] = None
    assert matrices_content(details)["damping"] is None


def test_errors_on_windows_held_out_are_told_where_there_are_any():
    details = synthetic.details("a", "wanda", "unstructured", synthetic.dense_scores(rows=3), blocks=1)
    found = matrices_content(details)
    assert found["relative_error_held_out"][0] == pytest.approx(1.1 * found["relative_error"][0], rel=1e-3)
    for row in details.matrices:
        del row["relative_error_held_out"]  # an older result
    assert matrices_content(details)["relative_error_held_out"] is None


def test_quantiles_are_students():
    found = quantiles([GROUP])
    assert found[6] == pytest.approx(t.ppf(0.975, 6))
    assert set(range(1, 301)) <= set(found)


def test_parameters_that_all_share_are_embedded_once():
    params = content([GROUP])["groups"][0]["params"]
    assert params["common"]["calibration.windows"] == 32
    assert params["own"][0]["method.name"] == "wanda"
    assert not params["common"].keys() & params["own"][0].keys()


def test_the_content_is_json():
    json.dumps(content([GROUP, synthetic.other_group()]), allow_nan=False)


def test_the_costs_are_those_that_were_measured():
    assert measured_costs(GROUP) == ["seconds", "peak_memory_gib", "kilojoules"]
    without = replace(GROUP, results=[replace(details, run={**details.run, "joules": None}) for details in GROUP.results])
    assert measured_costs(without) == ["seconds", "peak_memory_gib"]
    both = replace(GROUP.results[0], run={**GROUP.results[0].run, "joules": {"package-0": 1500.0, "GPU": 2000.0}})
    assert costs(both)["kilojoules"] == 3.5
