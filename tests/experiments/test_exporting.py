"""Experiments as other trackers have them, written and read back with their own clients; nothing leaves the machine."""

import json
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stages import export
from stages.errors import ConfigError, SparsesweepError
from stages.experiments import exporting, mlflow_runs, wandb_runs
from stages.experiments.commands import leaves
from stages.experiments.exporting import client, cut, runs, selected
from stages.experiments.reading import Experiment, Missing
from tests.experiments.test_table import PROTOCOL, experiment, measured

needs_mlflow = pytest.mark.skipif(
    not all(map(find_spec, exporting.MODULES["mlflow"])), reason="MLflow's client is not installed: the extra mlflow brings it"
)
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="W&B's client is not installed: the extra wandb brings it")
LONG = "x" * 7000
BLOCK = 32768  # bytes of a block of a .wandb file


def test_a_run_has_every_number_under_a_dotted_key():
    (run,) = runs([experiment("first", 20.0)])
    assert leaves(run.metrics) == {
        "corpora.news.perplexity": 20.0,
        "corpora.news.perplexity_stderr": 1.0,
        "corpora.news.dense_perplexity": 10.0,
        "corpora.news.perplexity_ratio": 2.0,
        "corpora.news.mean_kld": 0.5,
        "corpora.news.mean_kld_stderr": 0.125,
        "mean.tasks.accuracy": 0.4,
        "mean.tasks.accuracy_stderr": 0.03,
        "mean.tasks.accuracy_difference": -0.02,
        "prune.sparsity": 0.5,
        "prune.seconds": 61.2,
    }
    assert leaves(run.params) == {
        "base.source": "hub",
        "base.repo": "org/model",
        "calibration.seed": 0,
        "method.name": "wanda",
    }


def test_a_run_has_the_facts_that_tell_it_from_others():
    (run,) = runs([experiment("first", 20.0)])
    assert (run.name, run.command) == ("first", "(conf/ composes it no more; dvc exp apply first)")
    assert {name: fact for name, fact in run.facts.items() if len(fact) < 64} == {
        "method": "wanda",
        "pattern": "2:4",
        "revision": "abc",
        "base": "org/model",
    }
    assert run.facts["base_fingerprint"] == PROTOCOL["base"]
    assert run.facts["result"] == run.result
    text, boolq, _ = run.facts["scored"].split("; ")
    assert (text, boolq) == ("news, 512 tokens in windows of 128, 4 of 30 windows, none begun with BOS", "boolq (first 20 of 3,270 rows)")


def test_the_hash_of_the_protocol_is_that_of_what_is_compared():
    same = [experiment("a", 20.0), experiment("b", 30.0, delta="other", evaluation={"rows": 1})]
    other = [experiment("c", 20.0, bos=1), experiment("d", 20.0, base="e" * 64)]
    hashes = [run.facts["protocol"] for run in runs([*same, *other])]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_result_that_several_experiments_have_is_one_run_of_the_first():
    first, workspace = experiment("first", 20.0, delta="d"), experiment("workspace", 20.0, delta="d")
    assert [run.name for run in runs([first, workspace])] == ["first"]
    assert len(runs([first, experiment("other", 20.1, delta="d")])) == 2


def test_the_workspace_has_no_revision():
    (run,) = runs([workspace()])
    assert run.facts["revision"] == "workspace"


def workspace() -> Experiment:
    return Experiment(
        name="workspace",
        revision=None,
        params={"base": {"source": "local", "path": "model"}, "text": {"news": LONG}},
        measurements=[measured("perplexity", 2.0)],
        prune_metrics={"sparsity": 0.5},
        protocol=PROTOCOL,
        method="magnitude",
        pattern="unstructured",
    )


def test_a_value_that_is_cut_ends_with_its_length():
    assert cut("x" * 30, 30) == "x" * 30
    assert cut("x" * 31, 30) == "x" * 13 + "… (31 characters)"


def test_experiments_are_selected_by_name():
    both = [experiment("a", 20.0), experiment("b", 30.0)]
    assert selected(both, [], []) == both
    assert selected(both, [], ["b"]) == [both[1]]


def test_an_experiment_that_was_not_evaluated_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"^experiment 'c': not found \(not run\), wanted one of a$"):
        selected([experiment("a", 20.0)], [Missing(name="c", reason="not run")], ["a", "c"])


@pytest.mark.parametrize(("tracker", "absent"), [("mlflow", "mlflow and no sqlalchemy and no alembic"), ("wandb", "wandb")])
def test_a_missing_client_is_named_with_the_command_that_brings_it(tracker, absent, monkeypatch):
    for module in exporting.MODULES[tracker]:
        monkeypatch.setitem(sys.modules, module, None)
    advice = rf"pip install -c constraints.txt -e '\.\[{tracker}\]' brings what is missing"
    with pytest.raises(ConfigError, match=f"^found no package {absent}, wanted the client of {tracker}: {advice}$"):
        client(tracker)


@pytest.mark.parametrize("name", ["MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING"])
def test_a_client_reports_nothing_to_its_maker_unless_the_environment_says_so(name, monkeypatch):
    for module in exporting.MODULES["mlflow"]:
        monkeypatch.setitem(sys.modules, module, json)  # stands in for what is not installed
    for default in exporting.DEFAULTS:
        monkeypatch.setenv(default, "stated")
    client("mlflow")
    assert os.environ[name] == "stated"
    monkeypatch.delenv(name)
    client("mlflow")
    assert os.environ[name] == {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}[name]


def test_the_command_stops_without_its_client_before_it_reads_an_experiment(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(export, "read_experiments", lambda: pytest.fail("read"))
    monkeypatch.setattr(sys, "argv", ["export", "wandb"])
    with pytest.raises(SystemExit, match="^error: found no package wandb"):
        export.main()


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in exporting.DEFAULTS.items():
        monkeypatch.setenv(name, value)
    return client("mlflow")


@needs_mlflow
def test_mlflow_has_the_run_once_however_often_it_is_sent(mlflow, tmp_path):
    (run,) = sent = runs([experiment("first", 20.0)])
    (line,) = mlflow_runs.send(mlflow, sent, to="store", project="p")
    (again,) = mlflow_runs.send(mlflow, sent, to="store", project="p")
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    (found,) = store.search_runs([store.get_experiment_by_name("p").experiment_id])
    assert (line, again) == (f"first: sent, as run {found.info.run_id}", f"first: there already, as run {found.info.run_id}")
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.metrics == leaves(run.metrics)
    assert found.data.params == {name: str(value) for name, value in leaves(run.params).items()}
    assert {"base.source": "hub", "base.repo": "org/model", "method.name": "wanda"}.items() <= found.data.params.items()
    tags = {name: value for name, value in found.data.tags.items() if name != "mlflow.runName"}
    assert tags == {**run.facts, "mlflow.note.content": run.command}


@needs_mlflow
def test_mlflow_completes_a_run_that_an_interruption_left(mlflow, monkeypatch, tmp_path):
    sent = runs([workspace()])
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(mlflow.MlflowClient, "set_terminated", stopped)
        list(mlflow_runs.send(mlflow, sent, to=str(tmp_path), project="p"))
    (line,) = mlflow_runs.send(mlflow, sent, to=str(tmp_path), project="p")
    (found,) = store.search_runs([store.get_experiment_by_name("p").experiment_id])
    assert line == f"workspace: sent, as run {found.info.run_id}; cut to 6000 characters: text.news"
    assert found.info.status == "FINISHED"
    assert found.data.params["text.news"] == cut(LONG, 6000)


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@needs_mlflow
def test_mlflow_takes_more_parameters_than_a_request_has(mlflow, tmp_path):
    (run,) = runs([experiment("first", 20.0)])
    run.params["many"] = {f"key{index}": index for index in range(250)}
    list(mlflow_runs.send(mlflow, [run], to=str(tmp_path), project="p"))
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = store.search_runs([store.get_experiment_by_name("p").experiment_id])
    assert found.data.params == {key: str(value) for key, value in leaves(run.params).items()}


@needs_mlflow
def test_without_a_place_mlflow_writes_where_its_own_variable_says(mlflow, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/own.db")
    list(mlflow_runs.send(mlflow, runs([experiment("first", 20.0)]), to=None, project="p"))
    assert [path.name for path in tmp_path.iterdir()] == ["own.db"]


@needs_mlflow
def test_what_mlflow_refuses_is_said_in_its_words(mlflow, tmp_path):
    sent = runs([experiment("first", 20.0)])
    with pytest.raises(SparsesweepError, match="^MLflow refused: .*maintenance mode"):
        list(mlflow_runs.send(mlflow, sent, to=f"file:{tmp_path}/mlruns", project="p"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^--to: found the file file, wanted a directory or a URI such as sqlite:///file$"):
        list(mlflow_runs.send(mlflow, sent, to="file", project="p"))


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    local = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    for name, value in {**exporting.DEFAULTS, **local}.items():
        monkeypatch.setenv(name, value)
    module = client("wandb")
    yield module
    module.teardown()


@needs_wandb
def test_wandb_writes_the_run_offline_under_the_same_id_however_often_it_is_sent(wandb, tmp_path):
    (run,) = sent = runs([experiment("first", 20.0)])
    lines = [line for _ in range(2) for line in wandb_runs.send(wandb, sent, to=str(tmp_path / "to"), project="p", online=False)]
    wandb.teardown()  # waits until the files are written
    for line in lines:
        directory = Path(line.removeprefix(f"first: sent, as run {run.result[:32]} in "))
        assert directory.parent == tmp_path / "to/wandb"
        (path,) = directory.glob("*.wandb")
        stored = records(path)
        (begun,) = (record.run for record in stored if record.HasField("run"))
        assert (begun.run_id, begun.project, begun.display_name) == (run.result[:32], "p", "first")
        assert (list(begun.tags), begun.notes) == (["wanda", "2:4"], run.command)
        assert begun.run_group == f"protocol {run.facts['protocol'][:12]}"
        config = {update.key: json.loads(update.value_json) for update in begun.config.update}
        assert {key: value for key, value in config.items() if key != "_wandb"} == {**run.params, "experiment": run.facts}
        assert summary(stored) == leaves(run.metrics)
        assert any(record.HasField("exit") for record in stored)


def records(path: Path) -> list:
    """The records of a .wandb file: after 7 bytes a log of LevelDB's form, in blocks of which each part has a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at < len(data):
        if BLOCK - at % BLOCK < 7:  # no header fits; the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def summary(stored: list) -> dict[str, float]:
    """The summary that records leave, by dotted key."""
    left: dict[str, object] = {}
    for record in stored:
        for update in record.summary.update:
            left[".".join(update.nested_key) or update.key] = json.loads(update.value_json)
    return {key: value for key, value in leaves(left).items() if not key.startswith("_")}


@needs_wandb
def test_wandb_takes_a_directory_and_no_server(wandb, tmp_path):
    (tmp_path / "file").touch()
    for to, message in (
        ("http://a", "^--to: found http://a, wanted a directory; WANDB_BASE_URL and --online"),
        (str(tmp_path / "file"), "^--to: found the file .*file, wanted a directory$"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(wandb_runs.send(wandb, [], to=to, project="p", online=False))


@needs_wandb
def test_what_wandb_refuses_is_said_in_its_words(wandb, tmp_path):
    sent = runs([experiment("first", 20.0)])
    with pytest.raises(SparsesweepError, match="^W&B refused first: "):
        list(wandb_runs.send(wandb, sent, to=str(tmp_path), project="a/b", online=False))


def test_without_an_experiment_nothing_is_sent(monkeypatch, capsys):
    monkeypatch.setattr(export, "client", lambda tracker: None)
    monkeypatch.setattr(export, "read_experiments", lambda: ([], [Missing(name="gone", reason="why")]))
    monkeypatch.setattr(sys, "argv", ["export", "mlflow"])
    export.main()
    assert capsys.readouterr().out == "no experiment was evaluated yet; `dvc exp run` runs one\nleft out gone: why\n"


@needs_wandb
def test_the_command_says_what_it_sent_and_what_it_left_out(wandb, monkeypatch, capsys):
    monkeypatch.setattr(export, "read_experiments", lambda: ([experiment("first", 20.0)], [Missing(name="gone", reason="why")]))
    monkeypatch.setattr(sys, "argv", ["export", "wandb"])
    export.main()
    first, left_out = capsys.readouterr().out.splitlines()
    assert first.startswith("first: sent, as run ")
    assert left_out == "left out gone: why"
