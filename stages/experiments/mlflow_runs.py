"""Send runs to MLflow: one run each, in one MLflow experiment.

Parameters and metrics have dotted keys, such as pattern.sparsity and corpora.wikipedia.perplexity.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.errors import ConfigError, SparsesweepError
from stages.experiments.commands import leaves
from stages.experiments.exporting import Run, cut

PARAM, TAG = 6000, 8000  # characters that MLflow stores of a value
BATCH = 100  # parameters that it takes at once
NOTE = "mlflow.note.content"  # the tag that its pages show as the description
FINISHED = "FINISHED"
UNNAMEABLE = re.compile(r"[^\w./ -]")  # what MLflow does not take in the name of a metric


def send(mlflow: Any, sent: list[Run], *, to: str | None, project: str) -> Iterator[str]:
    """Send runs; one that is there already is left alone, one that an interruption left unfinished is completed.

    Args:
        mlflow: the client, see `client`. to: a tracking URI, or a directory for a database mlflow.db; None: where the client itself
            writes, which MLFLOW_TRACKING_URI sets. project: name of the MLflow experiment, made if it is not there.

    Yields:
        A line for each run: what became of it.

    Raises:
        ConfigError: `to` is a file. SparsesweepError: MLflow refuses; with its words.
    """
    try:
        store = mlflow.MlflowClient(tracking_uri=_uri(to))
        known = store.get_experiment_by_name(project)
        experiment = store.create_experiment(project) if known is None else known.experiment_id
        for run in sent:
            yield _send(mlflow, store, experiment, run)
    except mlflow.exceptions.MlflowException as error:
        raise SparsesweepError(f"MLflow refused: {error}") from error


def _send(mlflow: Any, store: Any, experiment: str, run: Run) -> str:
    found = store.search_runs([experiment], f"tags.result = '{run.result}'")
    tags = {name: cut(value, TAG) for name, value in {**run.facts, NOTE: run.command}.items()}
    at = (found[0] if found else store.create_run(experiment, run_name=run.name, tags=tags)).info
    if at.status == FINISHED:
        return f"{run.name}: there already, as run {at.run_id}"
    values = {key: _text(value) for key, value in leaves(run.params).items()}
    params = [mlflow.entities.Param(key, cut(value, PARAM)) for key, value in values.items()]
    numbers = {UNNAMEABLE.sub("", key): value for key, value in leaves(run.metrics).items()}
    metrics = [mlflow.entities.Metric(key, value, at.start_time, 0) for key, value in numbers.items()]
    for first in range(0, max(len(params), len(metrics)), BATCH):
        store.log_batch(at.run_id, params=params[first : first + BATCH], metrics=metrics[first : first + BATCH])
    store.set_terminated(at.run_id, FINISHED)
    shortened = [key for key, value in values.items() if len(value) > PARAM]
    return f"{run.name}: sent, as run {at.run_id}" + (f"; cut to {PARAM} characters: {', '.join(shortened)}" if shortened else "")


def _uri(to: str | None) -> str | None:
    if to is None or re.match(r"[a-z][\w+-]+:", to):
        return to
    directory = Path(to).resolve()
    if directory.is_file():
        raise ConfigError(f"--to: found the file {to}, wanted a directory or a URI such as sqlite:///{to}")
    directory.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{directory / 'mlflow.db'}"


def _text(value: Any) -> str:
    """A value as params.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value)
