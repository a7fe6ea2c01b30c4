"""Write the page, its tables and its plots into a directory."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from stages import limits
from stages.errors import SparsesweepError
from stages.evaluation.protocol import compared
from stages.experiments.details import Details
from stages.experiments.page import charts, repeats, words
from stages.experiments.page.content import content, matrices_content, measured_costs, points, protocol_rows, references
from stages.experiments.page.counts import basis
from stages.experiments.page.group import Group
from stages.experiments.page.tables import write_tables
from stages.experiments.paired import Metric, apart, of_tasks
from stages.experiments.reading import Missing
from stages.files import FRONTIERS, replacing

PACKAGE = "stages.experiments.page"
MARK = '<meta name="generator" content="sparsesweep">'
INLINED = {"css": "page.css", "statistics_script": "statistics.js", "page_script": "page.js"}
REPEATS = (repeats.repeated, repeats.said_of_single, repeats.between_settings, repeats.spread_words)  # what the template calls
SCALE = 2  # pixels of a PNG for each of a plot
SHOWN = 6  # experiments of a plot by task


def write(directory: Path, groups: Sequence[Group], missing: Sequence[Missing]) -> None:
    """Write index.html, the CSV files, and each plot as PNG and SVG; they take the place of what is in the directory.

    Args:
        groups: at least one. missing: what is left out, and why.
    """
    require_own(directory)
    with replacing(directory) as scratch:
        (scratch / "index.html").write_text(html(groups, missing), encoding="utf8")
        write_tables(scratch, groups)
        for name, spec in plots(groups):
            (scratch / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec), encoding="utf8")
            (scratch / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))


def keep_frontiers(groups: Sequence[Group]) -> str:
    """Write the first frontier of each protocol as a file of its own, for cards; its SHA-256, which names it."""
    data = json.dumps([first_frontier(group) for group in groups], ensure_ascii=False, allow_nan=False).encode()
    digest = hashlib.sha256(data).hexdigest()
    FRONTIERS.mkdir(exist_ok=True)
    scratch = FRONTIERS / f"{digest}.new"
    scratch.write_bytes(data)
    scratch.replace(FRONTIERS / f"{digest}.json")
    return digest


def first_frontier(group: Group) -> dict[str, Any]:
    """The frontier of a protocol's first metric, as a plot with data in which a card marks its release; see release.frontier."""
    metric = group.metrics[0]
    key = {"kind": metric.kind, "name": metric.name, "metric": metric.metric}
    data = of_metric(group, metric)
    return {"protocol": compared(group.results[0].experiment.protocol), **key, "plot": frontier(group, metric, data)}


def of_metric(group: Group, metric: Metric) -> dict[str, Any]:
    """The data of a metric's plots."""
    return {charts.POINTS: points(group, metric), charts.REFERENCES: references(group, metric)}


def frontier(group: Group, metric: Metric, data: dict[str, Any]) -> dict[str, Any]:
    """A metric against sparsity, with data."""
    return drawn(charts.frontier(metric, group.methods, group.patterns), data)


def require_own(directory: Path) -> None:
    """Refuse to take the place of files that are not an earlier page.

    Raises:
        SparsesweepError: the directory has files, and no index.html that was written here.
    """
    page = directory / "index.html"
    if directory.is_dir() and any(directory.iterdir()) and not (page.is_file() and MARK in page.read_text(encoding="utf8")):
        raise SparsesweepError(f"{directory}: found files that are no page of comparison, wanted a directory that is empty or not there")
    if directory.exists() and not directory.is_dir():
        raise SparsesweepError(f"{directory}: found a file, wanted a directory or nothing")


def html(groups: Sequence[Group], missing: Sequence[Missing]) -> str:
    """The whole page as one document, which loads nothing."""
    templates = PackageLoader(PACKAGE)
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    inlined = {name: templates.get_source(environment, file)[0] for name, file in INLINED.items()}
    inlined |= {"bundle": bundle(), "data": embedded(content(groups))}
    functions = {"best": words.best, "noise": words.noise, "text_of": words.text_of, "protocol_rows": protocol_rows}
    functions |= {function.__name__: function for function in REPEATS}
    functions |= {"basis": basis, "remarks": limits.remarks}
    return environment.get_template("page.html").render(groups=groups, missing=missing, **functions, **inlined)


def bundle() -> str:
    """Vega-Lite and what it needs, as a script whose names stay its own."""
    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # with any snippet, even an empty one, it sets no globals
    script = script.replace("</script", r"<\/script")
    return f"(function () {{ {script} }})();"


def embedded(data: Any) -> str:
    """JSON that may stand in a script element: no tag begins in it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")


def plots(groups: Sequence[Group]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each plot's file and its specification with data, on a white ground."""
    for number, group in enumerate(groups, start=1):
        for metric in group.metrics:
            data = of_metric(group, metric)
            name = file_name(metric.id, number)
            yield f"frontier-{name}", frontier(group, metric, data)
            for measure in measured_costs(group):
                yield f"{measure}-{name}", drawn(charts.cost(metric, measure, group.methods, group.patterns), data)
        if of_tasks(group.results):
            yield file_name("accuracy", number), drawn(charts.tasks("the dense model"), {charts.TASKS: task_rows(group)})
        for details in leaders(group):
            rows = matrix_rows(details)
            known = {row["quantity"] for row in rows if row["value"] is not None}
            data, panels = {charts.MATRICES: rows}, [charts.matrices(quantity) for quantity in charts.QUANTITIES if quantity in known]
            yield file_name(f"matrices-{details.name}", number), stacked(panels, data)


def file_name(name: str, number: int) -> str:
    """A plain name of a file. number: of its protocol."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{number}"


def drawn(spec: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """A plot with data, for a file."""
    datasets = {**spec.get("datasets", {}), **data}
    return {
        **spec,
        "width": charts.WIDTH,
        "datasets": datasets,
        "config": {**charts.theme(dark=False), "background": "white"},
        "padding": 16,
    }


def stacked(panels: Sequence[dict[str, Any]], data: dict[str, Any]) -> dict[str, Any]:
    """Plots below each other, each with a scale of its own."""
    inner = [{**{key: value for key, value in panel.items() if key != "$schema"}, "width": charts.WIDTH} for panel in panels]
    whole = {"$schema": panels[0]["$schema"], "vconcat": inner, "resolve": {"scale": {"color": "independent"}}}
    return {key: value for key, value in drawn(whole, data).items() if key != "width"}


def leaders(group: Group) -> list[Details]:
    """The best experiment of each pattern and sparsity by the first metric, as many as the page shows at first."""
    return [one.details for one in words.best(group, group.metrics[0])][:SHOWN]


def task_rows(group: Group) -> list[dict[str, Any]]:
    """The differences of the leaders to the dense model in each task."""
    rows = []
    for task, metric in of_tasks(group.results).items():
        for details in leaders(group):
            estimate = apart(metric, details.scores, group.dense)
            if estimate is not None:
                low, high = estimate.interval or (None, None)
                label = f"{details.name}: {details.experiment.method}, {details.asked}"
                rows.append({"experiment": label, "task": task, "value": estimate.value, "low": low, "high": high})
    return rows


def matrix_rows(details: Details) -> list[dict[str, Any]]:
    """The cells of the heat maps of an experiment."""
    found = matrices_content(details)
    rows = []
    for index, (block, kind, count) in enumerate(found["cells"]):
        for quantity in charts.QUANTITIES:
            of = found[quantity]
            value = of[index] if isinstance(of, list) else of
            rows.append({"block": block, "matrix": found["kinds"][kind], "count": count, "quantity": quantity, "value": value})
    return rows
