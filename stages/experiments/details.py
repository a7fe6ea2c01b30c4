"""Read what the page compares of an experiment: its measurements, both models' scores on every window and row, its matrices, its texts."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.measurement import Kind, Measurement, as_rows
from stages.evaluation.metrics import shown_measurements
from stages.evaluation.protocol import compared, differences
from stages.evaluation.results import RAW, samples_file
from stages.evaluation.statistics import numbered
from stages.experiments.commands import command
from stages.experiments.files import Files, Unreadable, cache_directory
from stages.experiments.reading import EVALUATION, Experiment, Missing
from stages.files import DENSE_RESULTS, PROMPT_SENSITIVITY, PRUNE_RESULTS, RULER_RESULTS, SPARSE_RESULTS

RUN = "run.json"
APART = 5e-3  # of a value [nats, or as a ratio], beyond what other arithmetic makes of it
RULER, RULER_PROTOCOL = RULER_RESULTS / "measurements.json", RULER_RESULTS / "protocol.json"
OF_TEXT = ("base", "tokenizer_sha256", "bos", "corpora", "dtype", "versions")  # keys of a protocol on which scores of text depend
OF_TASKS = ("tasks", "styles")  # and those of tasks besides
Row = dict[str, Any]
OfTask: TypeAlias = list[tuple[NDArray[np.float64], NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scored, piece by piece, by which two models are compared.

    windows: corpus -> name -> the mean over each window of what metrics keep, such as "nll" and "kld" [nats per token].
    rows: task -> metric -> each row's value.
    window_clusters, row_clusters: corpus or task -> of each window or row, what it shares with others.
    parts: group of tasks -> metric in which its tasks weigh alike, not its rows -> of each row, the task that it is of.
    """

    windows: dict[str, dict[str, list[float]]]
    rows: dict[str, dict[str, list[float]]]
    window_clusters: dict[str, list[Hashable]]
    row_clusters: dict[str, list[Hashable]]
    parts: dict[str, dict[str, list[Hashable]]] = field(default_factory=dict)
    _of_tasks: dict[tuple[str, str], "OfTask"] = field(default_factory=dict, init=False, compare=False, repr=False)

    def of_task(self, task: str, metric: str) -> "OfTask":
        """The values of a task's rows with their clusters: of each part on its own where parts weigh alike, else of all.

        Returns:
            Of each part [rows], float64, and [rows], int64; see statistics.numbered. Made once.
        """
        if (task, metric) not in self._of_tasks:
            values, clusters = np.array(self.rows[task][metric], dtype=np.float64), self.row_clusters[task]
            parts: dict[Hashable, list[int]] = defaultdict(list)
            for number, part in enumerate(self.parts.get(task, {}).get(metric, [None] * len(values))):
                parts[part].append(number)
            self._of_tasks[task, metric] = [(values[of], numbered([clusters[number] for number in of])) for of in parts.values()]
        return self._of_tasks[task, metric]


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
    found: dict[int, Details] = {}
    missing: list[Missing] = []
    dense: Scores | None = None
    cache = cache_directory()
    files = [Files(experiment.revision, cache) for experiment in experiments]
    digests = [of.digest(DENSE_RESULTS / "details") for of in files]
    most = next((digest for digest, _ in Counter(digests).most_common() if digest is not None), None)
    of_digest: dict[str | None, Scores] = {}
    for number in sorted(range(len(files)), key=lambda number: digests[number] != most):
        try:
            details = _details(experiments[number], files[number])
            own = of_digest.get(digests[number]) or of_dense(_dense_scores(experiments[number], files[number]))
            if digests[number] is not None:  # most have the same dense results: the very files
                of_digest[digests[number]] = own
            require_same_dense(own, dense or own)
            require_same_pieces(details.scores, dense or own)
            dense = dense or own
            found[number] = details
        except Unreadable as error:
            missing.append(Missing(name=experiments[number].name, reason=str(error)))
    return [found[number] for number in sorted(found)], dense, missing


def of_dense(scores: Scores) -> Scores:
    """The dense model's scores with those against itself, such as its divergence, which is 0 and is not measured."""
    known = [(shown.kept, shown.itself / shown.scale) for shown in shown_measurements().values() if shown.kept and shown.itself is not None]
    windows = {
        corpus: {**{kept: [value] * len(scores.window_clusters[corpus]) for kept, value in known}, **means}
        for corpus, means in scores.windows.items()
    }
    return replace(scores, windows=windows)


def require_same_dense(own: Scores, dense: Scores) -> None:
    """Refuse an experiment whose dense model had other scores of the same windows: differences to another's would not be its own.

    Raises:
        Unreadable: a window's value is apart by more than arithmetic explains; names corpus and metric.
    """
    for corpus, means in own.windows.items():
        for name, values in means.items():
            theirs = dense.windows.get(corpus, {}).get(name, [])
            if not all(math.isclose(*pair, rel_tol=APART, abs_tol=APART) for pair in zip(values, theirs, strict=False)):
                found = f"found other values of {name} of the dense model on {corpus} than most experiments have on the same windows"
                raise Unreadable(f"{found}, wanted the same: it was evaluated by other code; `dvc exp run {EVALUATION}` evaluates it again")


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
        command=command(experiment.params, published=experiment.published),
        measurements=[{**row, "name": name_of(measured)} for row, measured in zip(as_rows(made), made, strict=True)],
        scores=_scores(experiment, files, directory),
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
    """The measurements of quantised models, if they say that they are of the same base and text: one may be left of another run. Those of
    tasks, too, if these were asked alike."""
    rows: list[Row] = files.json(RULER) if files.has(RULER) else []
    if not rows or not files.has(RULER_PROTOCOL):
        return []
    theirs, ours = compared(files.json(RULER_PROTOCOL)), compared(experiment.protocol)
    of_text, of_tasks = (all(theirs.get(key) == ours.get(key) for key in keys) for keys in (OF_TEXT, OF_TASKS))
    if not of_text:
        return []
    return [{**row, "name": styled(row["name"], row["style"])} for row in rows if row["kind"] == Kind.CORPUS or of_tasks]


def name_of(measured: Measurement) -> str:
    """What a measurement is of, with the style of the prompts where that is another than raw."""
    return styled(measured.name, measured.style)


def styled(name: str, style: str) -> str:
    return name if style == RAW else f"{name} ({style})"


def _tasks(measurements: Sequence[Measurement]) -> dict[str, tuple[str, str]]:
    """The tasks, each in each style: what they are called, and both."""
    return {name_of(measured): (measured.name, measured.style) for measured in measurements if measured.kind == Kind.TASK}


def _dense_scores(experiment: Experiment, files: Files) -> Scores:
    """The dense model's scores next to an experiment's.

    Raises:
        Unreadable: they are of another protocol: that model was evaluated again since.
    """
    directory = DENSE_RESULTS / "details"
    differing = differences(compared(files.json(directory / "protocol.json")), compared(experiment.protocol))
    if differing:
        raise Unreadable(f"the dense model's scores are of another protocol ({', '.join(differing)}); `dvc repro {EVALUATION}` pairs them")
    return _scores(experiment, files, directory)


def _scores(experiment: Experiment, files: Files, directory: Path) -> Scores:
    """A model's scores; which tasks there are, and in what their parts weigh alike, the experiment says."""
    tasks, facts = _tasks(experiment.measurements), experiment.protocol["tasks"]
    windows: dict[str, dict[str, Any]] = files.json(directory / "windows.json")
    samples = {name: files.lines(samples_file(directory, task, style)) for name, (task, style) in tasks.items()}
    samples = {name: rows for name, rows in samples.items() if rows[0]["values"]}  # others have no score of a row
    return Scores(
        windows={corpus: {name: values for name, values in of.items() if name != "clusters"} for corpus, of in windows.items()},
        rows={task: {name: [row["values"][name] for row in rows] for name in rows[0]["values"]} for task, rows in samples.items()},
        window_clusters={corpus: of["clusters"] for corpus, of in windows.items()},
        row_clusters={task: [row["cluster"] for row in rows] for task, rows in samples.items()},
        parts={
            name: {metric: [row["task"] for row in rows] for metric in alike}
            for name, rows in samples.items()
            if (alike := facts[tasks[name][0]].get("macro"))
        },
    )
