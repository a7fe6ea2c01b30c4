"""What the stages recorded of the model that is to be published; refused where it does not belong together.

A stage that was run by hand may have left the results of another delta, or windows that the delta was not pruned with. The release
tells what was recorded with its own weights, never what params.yaml says by now.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import PROVENANCE
from stages.config.environment import Environment
from stages.errors import ReleaseError
from stages.evaluation.measurement import Measurement, from_rows
from stages.evaluation.protocol import EMBEDDED, read_protocol, require_same
from stages.files import (
    BASE,
    CALIBRATION,
    DENSE_RESULTS,
    FLOAT8_RESULTS,
    PROMPT_SENSITIVITY,
    PRUNE_RESULTS,
    SPARSE_RESULTS,
    TEXT,
    read_json,
)
from stages.pruning.section import ANY_MACHINE
from stages.recipe import Recipe

PROTOCOL, MEASUREMENTS = "details/protocol.json", "details/measurements.json"
RUN = "run.json"
EVALUATE_DENSE = "python -m stages.evaluate part=dense"
EVALUATE_SPARSE = "python -m stages.evaluate part=sparse"
RUN_FACTS = (
    "seconds",
    "peak_memory_gib",
    "joules",
    "device",
    "dtype",
    "batch",
    "processes",
    "resumed_after",
    "kept_statistics",
    "allocation_judged",
    "reconstructions",
    "distillation",
    "divergences",
    "out_of_scope",
    "code",
    "versions",
)
NOWHERE = {"repo": None, "private": True, "existing": False, "dry_run": False}  # who replays a release does not send it

Data = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Records:
    """What the stages wrote about what they did.

    base, text, calibration, prune: the provenance of each. dense, sparse: measurements. dense_protocol, protocol: what the measurements
    of the dense and of the pruned model mean. tasks: both models on the same rows, a row a task, see
    comparison.paired.paired_accuracies. generations: a row a prompt, both models'. dense_run, sparse_run: what the evaluations took.
    sensitivity: a row for each other style of prompts and task, see comparison.paired.prompt_sensitivity.
    """

    base: Data
    text: Data
    calibration: Data
    prune: Data
    dense: list[Measurement]
    sparse: list[Measurement]
    dense_protocol: Data
    protocol: Data
    tasks: list[Data]
    generations: list[Data]
    dense_run: Data
    sparse_run: Data
    sensitivity: list[Data]

    @classmethod
    def read(cls) -> "Records":
        """
        Raises:
            SparsesweepError: a file is missing; names it.
        """
        sensitivity = SPARSE_RESULTS / PROMPT_SENSITIVITY
        return cls(
            base=read_json(BASE / PROVENANCE),
            text=read_json(TEXT / PROVENANCE),
            calibration=read_json(CALIBRATION / PROVENANCE),
            prune=read_json(PRUNE_RESULTS / PROVENANCE),
            dense=_measurements(DENSE_RESULTS / MEASUREMENTS),
            sparse=_measurements(SPARSE_RESULTS / MEASUREMENTS),
            dense_protocol=read_json(DENSE_RESULTS / PROTOCOL),
            protocol=read_json(SPARSE_RESULTS / PROTOCOL),
            tasks=read_json(SPARSE_RESULTS / "details/paired.json"),
            generations=read_json(SPARSE_RESULTS / "details/generations.json"),
            dense_run=read_json(DENSE_RESULTS / RUN),
            sparse_run=read_json(SPARSE_RESULTS / RUN),
            sensitivity=read_json(sensitivity) if sensitivity.is_file() else [],
        )

    def require_of(self, delta: SparseDelta) -> None:
        """Refuse what was not recorded with this delta.

        Raises:
            ReleaseError: names the file, what it has, what it should have, and the command to run.
            ComparisonError: the results of the dense and of the pruned model are not of the same protocol.
        """
        self._require_sections()
        self._require_pruned_with(delta.recipe)
        self._require_evaluated(delta)
        self._require_text()

    def _require_sections(self) -> None:
        """Every stage recorded the section of the configuration that it ran with."""
        wanted = (
            (BASE / PROVENANCE, self.base, "section", "python -m stages.fetch part=base"),
            (TEXT / PROVENANCE, self.text, "section", "python -m stages.fetch part=text"),
            (CALIBRATION / PROVENANCE, self.calibration, "section", "python -m stages.sample"),
            (SPARSE_RESULTS / PROTOCOL, self.protocol, "evaluation", EVALUATE_SPARSE),
        )
        for path, data, key, command in wanted:
            if not isinstance(data.get(key), dict):
                raise ReleaseError(f"{path}: found no {key}, wanted the configuration that made it; run {command}")

    def _require_pruned_with(self, recipe: Recipe) -> None:
        path = CALIBRATION / PROVENANCE
        _require(path, "windows drawn for base", self.calibration.get("base"), recipe.base, "python -m stages.sample")
        windows = self.calibration.get("windows_sha256")
        _require(path, "windows with SHA-256", windows, recipe.calibration, "python -m stages.prune")
        for key, wanted in recipe.as_dict().items():
            _require(PRUNE_RESULTS / PROVENANCE, f"another recipe: {key}", self.prune.get(key), wanted, "python -m stages.prune")

    def _require_evaluated(self, delta: SparseDelta) -> None:
        sparse, dense = SPARSE_RESULTS / PROTOCOL, DENSE_RESULTS / PROTOCOL
        _require(sparse, "results of base", self.protocol.get("base"), delta.recipe.base, EVALUATE_SPARSE)
        _require(sparse, "results of delta", self.protocol.get("delta"), delta.fingerprint, EVALUATE_SPARSE)
        _require(dense, "results of base", self.dense_protocol.get("base"), delta.recipe.base, EVALUATE_DENSE)
        _require(dense, "results of delta", self.dense_protocol.get("delta"), None, EVALUATE_DENSE)
        names = (str(dense), str(sparse))
        require_same(read_protocol(dense), read_protocol(sparse), names=names, remedy=f"run {EVALUATE_DENSE}, then {EVALUATE_SPARSE}")
        theirs = {(measured.key, measured.style): measured.value for measured in self.dense}
        for measured in self.sparse:
            if measured.dense is not None:
                subject = f"{measured.name} compared with a {measured.metric} of"
                _require(
                    SPARSE_RESULTS / MEASUREMENTS, subject, measured.dense, theirs.get((measured.key, measured.style)), EVALUATE_SPARSE
                )

    def _require_text(self) -> None:
        """The windows were drawn from, and the models scored on, the text that the fetch stage left."""
        path, files = TEXT / PROVENANCE, self.text["files"]
        for name, source in self.calibration["sources"].items():
            actual = files.get(f"calibration/{name}.jsonl", {}).get("sha256")
            _require(path, f"calibration/{name}.jsonl with SHA-256", actual, source["sha256"], "python -m stages.sample")
        scored = {name: corpus["sha256"] for name, corpus in self.protocol["corpora"].items()}
        scored |= {name: task["sha256"] for name, task in self.protocol["tasks"].items() if task["source"] == EMBEDDED}
        for name, wanted in scored.items():
            actual = files.get(f"evaluation/{name}.jsonl", {}).get("sha256")
            _require(path, f"evaluation/{name}.jsonl with SHA-256", actual, wanted, f"{EVALUATE_DENSE}, then {EVALUATE_SPARSE}")

    def require_versions(self, environment: Environment) -> None:
        """Refuse results of other versions than the release's params.yaml will name.

        Raises:
            ReleaseError: names the file, the library, and both versions.
        """
        recorded = (
            (PRUNE_RESULTS / PROVENANCE, self.prune, "python -m stages.prune"),
            (SPARSE_RESULTS / PROTOCOL, self.protocol, EVALUATE_SPARSE),
        )
        for path, data, command in recorded:
            for library, wanted in asdict(environment).items():
                version = data["versions"].get(library.replace("_", "-"))
                if version is not None:
                    _require(path, f"results of {library}", Version(version).public, wanted, command)

    def float8(self, delta: SparseDelta) -> list[Measurement]:
        """The measurements of the pruned model as float8.

        Raises:
            ReleaseError: there are none, or they are of another delta. ComparisonError: their protocol is another.
        """
        path, command = FLOAT8_RESULTS / "protocol.json", "python -m stages.evaluate_float8"
        if not path.is_file():
            raise ReleaseError(f"{path}: not found, wanted results of the pruned model in float8; run {command}")
        _require(path, "results of delta", read_json(path).get("delta"), delta.fingerprint, command)
        sparse = SPARSE_RESULTS / PROTOCOL
        require_same(read_protocol(path), read_protocol(sparse), names=(str(path), str(sparse)), remedy=f"run {command}")
        return _measurements(FLOAT8_RESULTS / "measurements.json")

    @property
    def evaluated_on(self) -> list[str]:
        """The corpora and the tasks."""
        return [*self.protocol["corpora"], *self.protocol["tasks"]]

    def sections(self, recipe: Recipe, *, publish: Data, environment: Data) -> dict[str, Data]:
        """params.yaml as it was when each stage ran, by section."""
        return {
            "environment": environment,
            "base": self.base["section"],
            "text": self.text["section"],
            "calibration": self.calibration["section"],
            **recipe.sections,
            "prune": {**ANY_MACHINE, **recipe.prune},
            "evaluation": self.protocol["evaluation"],
            "ruler": {"types": [], "tasks": False},  # a release is not compared with quantised models
            "publish": {**publish, "hub": NOWHERE},
        }

    @property
    def run(self) -> Data:
        """What the prune stage took, without the facts about the machine's disks."""
        return {key: self.prune[key] for key in RUN_FACTS if key in self.prune}


def _measurements(path: Path) -> list[Measurement]:
    try:
        return from_rows(read_json(path))
    except ValueError as error:
        raise ReleaseError(f"{path}: found no measurements ({error}), wanted those of {EVALUATE_DENSE}, then {EVALUATE_SPARSE}") from None


def _require(path: Path, name: str, value: object, wanted: object, command: str) -> None:
    if value != wanted:
        raise ReleaseError(f"{path}: found {name} {_short(value)}, wanted {_short(wanted)}; run {command}")


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
