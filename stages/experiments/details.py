"""Read what the page compares of an experiment: its measurements, both models' scores on every window and row, its matrices, its texts."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.evaluation.measurement import Kind, Measurement, as_rows
from stages.evaluation.metrics import shown_measurements
from stages.evaluation.results import RAW, samples_file
from stages.experiments.commands import command
from stages.experiments.files import Files, Unreadable, cache_directory
from stages.experiments.reading import Experiment, Missing
from stages.files import DENSE_RESULTS, PROMPT_SENSITIVITY, PRUNE_RESULTS, RULER_RESULTS, SPARSE_RESULTS

RUN = "run.json"
RULER, RULER_PROTOCOL = RULER_RESULTS / "measurements.json", RULER_RESULTS / "protocol.json"
OF_TEXT = ("base", "tokenizer_sha256", "bos", "corpora", "dtype", "versions")  # keys of a protocol on which scores of text depend
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scored, piece by piece, by which two models are compared.

    windows: corpus -> name -> the mean over each window of what metrics keep, such as "nll" and "kld" [nats per token].
    rows: task -> metric -> each row's value.
    window_clusters, row_clusters: corpus or task -> of each window or row, what it shares with others.
    """

    windows: dict[str, dict[str, list[float]]]
    rows: dict[str, dict[str, list[float]]]
    window_clusters: dict[str, list[Hashable]]
    row_clusters: dict[str, list[Hashable]]


@dataclass(frozen=True, kw_only=True)
class Details:
    """Everything that is known of an experiment.

    command: the line that runs it again; None: conf/ has changed, so that no line does.
    measurements: of the pruned model, see results/sparse/details/measurements.json. generations: both models' texts.
    matrices: rows of results/prune/sparsity.json. run: the record of the prune stage. ruler: measurements of quantised models, or none.
    speed: "dense" and "sparse" -> how fast that model continued the prompts, and on what; as far as it was measured.
    sensitivity: how far dense and pruned drift apart by style of prompts, see comparison.paired.prompt_sensitivity.
    """

    experiment: Experiment
    command: str | None
    measurements: list[Row]
    scores: Scores
    generations: list[Row]
    matrices: list[Row]
    run: Row
    ruler: list[Row]
    speed: dict[str, Row] = field(default_factory=dict)
    sensitivity: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def weights(self) -> int:
        """The number of weights in scope."""
        return sum(row["weights"] for row in self.matrices)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights in scope, as achieved, in [0, 1)."""
        return sum(row["zeros"] for row in self.matrices) / self.weights

    @property
    def asked(self) -> str:
        """The pattern, and the sparsity that was asked for where the pattern does not state it."""
        sparsity = self.experiment.params["pattern"].get("sparsity")
        return self.experiment.pattern if sparsity is None else f"{self.experiment.pattern} {100 * sparsity:.4g}%"


def read_details(experiments: Sequence[Experiment]) -> tuple[list[Details], Scores | None, list[Missing]]:
    """Read the details of experiments of one protocol, from the workspace, the cache or a remote.

    Returns:
        The details; the dense model's scores, which all of them share, None without any experiment; and what cannot be read.
    """
    found: list[Details] = []
    missing: list[Missing] = []
    dense: Scores | None = None
    cache = cache_directory()
    for experiment in experiments:
        try:
            files = Files(experiment.revision, cache)
            details = _details(experiment, files)
            dense = dense or of_dense(_scores(files, DENSE_RESULTS / "details", _tasks(experiment.measurements)))
            require_same_pieces(details.scores, dense)
            found.append(details)
        except Unreadable as error:
            missing.append(Missing(name=experiment.name, reason=str(error)))
    return found, dense, missing


def of_dense(scores: Scores) -> Scores:
    """The dense model's scores with those against itself, such as its divergence, which is 0 and is not measured."""
    known = [(shown.kept, shown.itself / shown.scale) for shown in shown_measurements().values() if shown.kept and shown.itself is not None]
    windows = {
        corpus: {**{kept: [value] * len(scores.window_clusters[corpus]) for kept, value in known}, **means}
        for corpus, means in scores.windows.items()
    }
    return Scores(windows=windows, rows=scores.rows, window_clusters=scores.window_clusters, row_clusters=scores.row_clusters)


def require_same_pieces(scores: Scores, dense: Scores) -> None:
    """Refuse scores of other windows or rows than the dense model's.

    Raises:
        Unreadable: names the corpus or task, and both numbers.
    """
    pairs = [(scores.window_clusters, dense.window_clusters, "windows"), (scores.row_clusters, dense.row_clusters, "rows")]
    for ours, theirs, pieces in pairs:
        for name, clusters in ours.items():
            other = theirs.get(name, [])
            if clusters != other:
                numbers = f"found {len(clusters)} {pieces} of {name}, wanted the dense model's {len(other)} with the same clusters"
                raise Unreadable(f"{numbers}; evaluate both again")


def _details(experiment: Experiment, files: Files) -> Details:
    directory, made = SPARSE_RESULTS / "details", experiment.measurements
    sensitivity = SPARSE_RESULTS / PROMPT_SENSITIVITY
    return Details(
        experiment=experiment,
        command=command(experiment.params),
        measurements=[{**row, "name": name_of(measured)} for row, measured in zip(as_rows(made), made, strict=True)],
        scores=_scores(files, directory, _tasks(experiment.measurements)),
        generations=files.json(directory / "generations.json"),
        matrices=files.json(PRUNE_RESULTS / "sparsity.json"),
        run=files.json(PRUNE_RESULTS / "provenance.json"),
        ruler=_ruler(files, experiment),
        speed=_speed(files),
        sensitivity=files.json(sensitivity) if files.has(sensitivity) else [],
    )


def _speed(files: Files) -> dict[str, Row]:
    """What the evaluations say of generating text; earlier versions say nothing."""
    paths = {"dense": DENSE_RESULTS / RUN, "sparse": SPARSE_RESULTS / RUN}
    runs = {name: files.json(path) for name, path in paths.items() if files.has(path)}
    return {name: {**run["generation"], "device": run["device"]} for name, run in runs.items() if run.get("generation")}


def _ruler(files: Files, experiment: Experiment) -> list[Row]:
    """The measurements of quantised models, if they say that they are of the same base and text: one may be left of another run."""
    rows: list[Row] = files.json(RULER) if files.has(RULER) else []
    if not rows or not files.has(RULER_PROTOCOL):
        return []
    protocol = files.json(RULER_PROTOCOL)
    return rows if all(protocol[key] == experiment.protocol[key] for key in OF_TEXT) else []


def name_of(measured: Measurement) -> str:
    """What a measurement is of, with the style of the prompts where that is another than raw."""
    return measured.name if measured.style == RAW else f"{measured.name} ({measured.style})"


def _tasks(measurements: Sequence[Measurement]) -> dict[str, tuple[str, str]]:
    """The tasks, each in each style: what they are called, and both."""
    return {name_of(measured): (measured.name, measured.style) for measured in measurements if measured.kind == Kind.TASK}


def _scores(files: Files, directory: Path, tasks: dict[str, tuple[str, str]]) -> Scores:
    windows: dict[str, dict[str, Any]] = files.json(directory / "windows.json")
    samples = {name: files.lines(samples_file(directory, task, style)) for name, (task, style) in tasks.items()}
    samples = {name: rows for name, rows in samples.items() if rows[0]["values"]}  # others have no score of a row
    return Scores(
        windows={corpus: {name: values for name, values in of.items() if name != "clusters"} for corpus, of in windows.items()},
        rows={task: {name: [row["values"][name] for row in rows] for name in rows[0]["values"]} for task, rows in samples.items()},
        window_clusters={corpus: of["clusters"] for corpus, of in windows.items()},
        row_clusters={task: [row["cluster"] for row in rows] for task, rows in samples.items()},
    )
