"""A measured number with what it takes to read it: its error, how many values it is the mean of, its unit, and which way is better."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from stages.evaluation.statistics import Estimate
from stages.plain_data import of_type


class Better(StrEnum):
    """The direction in which a measurement improves."""

    LOWER = "lower"
    HIGHER = "higher"


class Kind(StrEnum):
    """What a measurement is of."""

    CORPUS = "corpus"
    TASK = "task"
    MEAN = "mean"
    SIZE = "size"
    GENERATION = "generation"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The pruned model's value less the dense model's, on the same windows or rows.

    stderr: its standard error, clustered. low, high: the ends of its 95% interval. None where there are fewer than two clusters, or where
    the error is not known.
    """

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, estimate: Estimate) -> "Difference":
        """Make a difference of its estimate."""
        return cls(**estimated(estimate))

    def shown(self, digits: int) -> str:
        """The value, signed, with its standard error where that is known: "+0.010 ± 0.020"."""
        return f"{self.value:+.{digits}f}" + ("" if self.stderr is None else f" ± {self.stderr:.{digits}f}")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of one model.

    kind, name: what it is of: a corpus or a task by its name, the mean over tasks, or the generations of a form of the prompts.
    metric: its name, in metrics.json as well.
    label: the words for it in tables.
    value: finite. stderr: its standard error, clustered, see statistics.mean; None where it is not known. low, high: the ends of its 95%
        interval, or None.
    count: how many values it is made of. counted: what they are: tokens, rows or tasks. clusters: how many of them are independent.
    unit: "" for none, else such as "nats" or "%". better: the direction in which it improves; None: neither.
    dense: the dense model's value; None for the dense model itself, and for what compares with it. difference: see Difference, or None.
    style: form of the prompts of a task, see stages/evaluation/styles.py.
    """

    kind: Kind
    name: str
    metric: str
    label: str
    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    count: int
    counted: str
    clusters: int
    unit: str = ""
    better: Better | None = None
    dense: float | None = None
    difference: Difference | None = None
    style: str = "raw"

    @property
    def key(self) -> tuple[Kind, str, str]:
        """What it is of, and its metric."""
        return self.kind, self.name, self.metric

    def shown(self, digits: int) -> str:
        """The value with its standard error, where that is known: "31.68 ± 0.42"."""
        error = "" if self.stderr is None else f" ± {self.stderr:.{digits}f}"
        return f"{self.value:.{digits}f}{error}{self.unit and ' '}{self.unit}"

    @classmethod
    def of(cls, estimate: Estimate, *, scale: float = 1.0, **facts: Any) -> "Measurement":
        """Make a measurement of an estimated mean.

        Args:
            scale: by which value and errors are multiplied, such as 100 for percent. facts: the other fields.
        """
        return cls(**estimated(estimate, scale), **facts)


def estimated(estimate: Estimate, scale: float = 1.0) -> dict[str, Any]:
    """The fields of a measurement or a difference that an estimate gives; scale: see Measurement.of."""
    low, high = (None, None) if estimate.interval is None else (scale * end for end in estimate.interval)
    stderr = None if estimate.stderr is None else scale * estimate.stderr
    return {"value": scale * estimate.value, "stderr": stderr, "low": low, "high": high}


SECTIONS = {  # of metrics.json
    Kind.CORPUS: "corpora",
    Kind.TASK: "tasks",
    Kind.MEAN: "mean",
    Kind.SIZE: "size",
    Kind.GENERATION: "generations",
}


def metrics(measurements: Iterable[Measurement]) -> dict[str, dict[str, dict[str, Any]]]:
    """The numbers alone, for metrics.json: section -> name -> metric, with "_stderr" and "dense_" where these are known.

    The section "styles" has those of other styles than raw: style -> task -> metric; "tasks" among the tasks is their mean.
    """
    sections: dict[str, dict[str, dict[str, Any]]] = {}
    for measurement in measurements:
        if measurement.style == "raw":
            section = sections.setdefault(SECTIONS[measurement.kind], {})
        else:
            section = sections.setdefault("styles", {}).setdefault(measurement.style, {})
        numbers = section.setdefault(measurement.name, {})
        numbers[measurement.metric] = measurement.value
        if measurement.stderr is not None:
            numbers[f"{measurement.metric}_stderr"] = measurement.stderr
        if measurement.dense is not None:
            numbers[f"dense_{measurement.metric}"] = measurement.dense
        if measurement.difference is not None:
            numbers[f"{measurement.metric}_difference"] = measurement.difference.value
            if measurement.difference.stderr is not None:
                numbers[f"{measurement.metric}_difference_stderr"] = measurement.difference.stderr
    return sections


def as_rows(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """As plain data, for measurements.json."""
    return [asdict(measurement) for measurement in measurements]


def from_rows(rows: Any) -> list[Measurement]:
    """What as_rows gave.

    Raises:
        ValueError: a row has other keys, or values of another type; names the row and the key.
    """
    measurements: list[Measurement] = of_type(list[Measurement], rows, "measurements")
    return measurements
