"""Reading what the stages wrote of an experiment, from the workspace and from a commit."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from stages.experiments import details as module
from stages.experiments.details import read_details
from stages.experiments.files import Unreadable
from stages.experiments.reading import Experiment
from tests.experiments import synthetic
from tests.project import ENVIRONMENT


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> tuple[Path, str]:
    """A DVC project with one evaluated experiment, and its commit."""
    root = tmp_path_factory.mktemp("project")
    dense = synthetic.dense_scores(rows=6)
    details = synthetic.details("a", "wanda", "unstructured", dense, blocks=1)
    for name, scores in (("dense", dense), ("sparse", details.scores)):
        directory = root / "results" / name / "details"
        directory.mkdir(parents=True)
        windows = {corpus: {"clusters": scores.window_clusters[corpus], **means} for corpus, means in scores.windows.items()}
        (directory / "windows.json").write_text(json.dumps(windows))
        for task, of in scores.rows.items():
            pairs = zip(scores.row_clusters[task], of["acc"], strict=True)
            rows = [{"row": row, "cluster": cluster, "values": {"acc": int(value)}} for row, (cluster, value) in enumerate(pairs)]
            (directory / f"samples-{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "results/dense/details/protocol.json").write_text(json.dumps({**details.experiment.protocol, "delta": None}))
    (root / "results/sparse/details/measurements.json").write_text(json.dumps(details.measurements))
    (root / "results/sparse/details/generations.json").write_text(json.dumps(details.generations))
    (root / "results/prune").mkdir()
    (root / "results/prune/sparsity.json").write_text(json.dumps(details.matrices))
    (root / "results/prune/provenance.json").write_text(json.dumps(details.run))
    for name, speed in details.speed.items():
        of_run = {"device": speed["device"], "generation": {key: value for key, value in speed.items() if key != "device"}}
        (root / "results" / name / "run.json").write_text(json.dumps(of_run))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-q", "-m", "One experiment"]):
        subprocess.run(command, cwd=root, env=ENVIRONMENT, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return root, done.stdout.strip()


@pytest.fixture()
def experiment(repository, monkeypatch) -> Experiment:
    monkeypatch.chdir(repository[0])
    monkeypatch.setattr(module, "command", lambda params, *, published: "dvc exp run")
    made = synthetic.details("a", "wanda", "unstructured", synthetic.dense_scores(rows=6), blocks=1)
    return replace(made.experiment, revision=None)


@pytest.mark.parametrize("of_commit", [False, True])
def test_all_of_an_experiment_is_read(experiment, repository, of_commit):
    (found,), dense, missing = read_details([replace(experiment, revision=repository[1] if of_commit else None)])
    wanted = synthetic.details("a", "wanda", "unstructured", synthetic.dense_scores(rows=6), blocks=1)
    assert missing == []
    assert found.scores == wanted.scores
    assert found.measurements == wanted.measurements
    assert (found.generations, found.matrices, found.run, found.ruler) == (wanted.generations, wanted.matrices, wanted.run, [])
    assert found.speed == wanted.speed
    assert (found.command, found.sparsity, found.asked) == ("dvc exp run", 0.5, "unstructured 50%")
    assert dense.windows["wikipedia"]["kld"] == [0.0] * synthetic.WINDOWS


def test_a_speed_that_was_not_measured_is_none(experiment, repository):
    dense, sparse = (repository[0] / "results" / name / "run.json" for name in ("dense", "sparse"))
    before = dense.read_text(), sparse.read_text()
    dense.unlink()  # an older result
    sparse.write_text('{"device": "a CPU", "generation": null}')
    ((found,), _, _) = read_details([experiment])
    dense.write_text(before[0])
    sparse.write_text(before[1])
    assert found.speed == {}


def test_the_drift_by_style_is_read_where_there_is_one(experiment, repository):
    path = repository[0] / "results/sparse/details/prompt_sensitivity.json"
    path.write_text('[{"style": "chat"}]')
    ((found,), _, _) = read_details([experiment])
    path.unlink()
    assert found.sensitivity == [{"style": "chat"}]


def test_a_ruler_is_read_where_there_is_one(experiment, repository):
    ruler = repository[0] / "results/ruler/measurements.json"
    ruler.parent.mkdir()
    of_text = {"type": "Q4_0", "kind": "corpus", "name": "wikipedia", "style": "raw"}
    of_tasks = {"type": "Q4_0", "kind": "mean", "name": "tasks", "style": "chat"}
    ruler.write_text(json.dumps([of_text, of_tasks]))
    found = []
    # one that a run of another base left is none; of one whose tasks were asked otherwise the text counts
    for other in ({}, {"base": "another"}, {"tasks": {}}):
        ruler.with_name("protocol.json").write_text(json.dumps(experiment.protocol | other))
        ((of_base,), _, _) = read_details([experiment])
        found.append(of_base.ruler)
    ruler.with_name("protocol.json").unlink()
    ((without_protocol,), _, _) = read_details([experiment])
    ruler.unlink()
    ruler.parent.rmdir()
    assert [*found, without_protocol.ruler] == [[of_text, {**of_tasks, "name": "tasks (chat)"}], [], [of_text], []]


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        ("results/sparse/details/windows.json", None, "windows.json is not there .*; `make receive` brings it"),
        ("results/sparse/details/windows.json", "{", "windows.json: not JSON"),
        (
            "results/dense/details/samples-boolq.jsonl",
            '{"row": 0, "cluster": 0, "values": {"acc": 1}}\n',
            "found 6 rows of boolq, wanted the dense model's 1 with the same clusters; evaluate both again",
        ),
        (
            "results/dense/details/protocol.json",
            '{"base": "another"}',
            "the dense model's scores are of another protocol .base, .*; `dvc repro evaluate_sparse` pairs them",
        ),
    ],
)
def test_what_cannot_be_read_is_left_out_with_the_reason(experiment, repository, path, content, reason):
    file = repository[0] / path
    before = file.read_text()
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    found, _, (missing,) = read_details([experiment])
    file.write_text(before)
    assert found == []
    assert missing.name == "a"
    assert re.search(reason, missing.reason)


def test_a_revision_that_is_not_there_is_left_out(experiment):
    found, dense, (missing,) = read_details([replace(experiment, revision="f" * 40)])
    assert (found, dense) == ([], None)
    assert "unknown Git revision" in missing.reason


def test_a_dense_model_with_other_scores_of_the_same_windows_leaves_its_experiment_out(experiment):
    dense = module.of_dense(synthetic.dense_scores(rows=6))
    (corpus, means), *_ = dense.windows.items()
    module.require_same_dense(dense, dense)
    module.require_same_dense(replace(dense, windows={corpus: {"nll": [1.001 * value for value in means["nll"]]}}), dense)
    other = replace(dense, windows={corpus: {"nll": [1.1 * value for value in means["nll"]]}})
    with pytest.raises(Unreadable, match=f"found other values of nll of the dense model on {corpus} than most experiments have"):
        module.require_same_dense(other, dense)
