"""The picture of a card: this release among the experiments of its protocol.

`make compare` keeps the frontier of each protocol by its first metric in frontiers/SHA256.json, as a Vega-Lite plot that holds its data.
publish.frontier is that hash, so that which experiments a picture shows is stated as every other choice is.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import ReleaseError
from stages.evaluation.measurement import Measurement
from stages.evaluation.protocol import compared, differences
from stages.files import FRONTIERS, parsed_json
from stages.limits import counted
from stages.plain_data import of_type
from stages.rows import shown

KEY = "publish.frontier"
PICTURE, DATA = "frontier.png", "frontiers.json"  # in a release
SCALE = 2  # pixels of the picture for each of the plot
NAMED = 4  # differences that an error names
INK = "#1d2126"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What a file has of a protocol.

    protocol: what is compared of it. kind, name, metric: of the measurements that the plot is of, see Measurement.key. plot: as Vega-Lite
    with data.
    """

    protocol: dict[str, Any]
    kind: str
    name: str
    metric: str
    plot: dict[str, Any]

    @property
    def points(self) -> list[dict[str, Any]]:
        """The experiments that the plot shows."""
        points: list[dict[str, Any]] = self.plot["datasets"]["points"]
        return points


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a release has of a frontier. digest: SHA-256 of data. png, data: the bytes of both files. markdown: for the card."""

    digest: str
    png: bytes
    data: bytes
    markdown: str

    def write(self, release: Path) -> None:
        (release / PICTURE).write_bytes(self.png)
        (release / DATA).write_bytes(self.data)

    @property
    def kept_again(self) -> str:
        """The shell commands by which a clone has the data of a release."""
        return f"mkdir -p {FRONTIERS} && cp RELEASE/{DATA} {FRONTIERS}/{self.digest}.json"


def draw(
    digest: str, protocol: Mapping[str, Any], measurements: Iterable[Measurement], *, sparsity: float, sparse: Iterable[Measurement]
) -> Picture:
    """Draw the frontier of the protocol that a release was evaluated by, with the release marked.

    Args:
        digest: SHA-256 of the file. protocol: of the release, as plain data. measurements: of the released weights. sparse: of the pruned
            model, which differ where it was rounded since.

    Raises:
        ReleaseError: the file is not there, is another, or is not what `make compare` keeps; it has no experiment of this protocol: names
            what differs; or the release was not scored by the frontier's metric.
    """
    path = FRONTIERS / f"{digest}.json"
    remedy = f"`make compare` keeps such a file in this directory (runs in checkouts of their own have none), a release has it as {DATA}"
    if not path.is_file():
        raise ReleaseError(f"{KEY}: {path}: not found; {remedy}")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise ReleaseError(f"{KEY}: found {path} with SHA-256 {found}, wanted {digest}; {remedy}")
    try:
        frontiers: list[Frontier] = of_type(list[Frontier], _without_counts(parsed_json(data)), str(path))
    except ValueError as error:
        raise ReleaseError(f"{KEY}: {error}; {remedy}") from None
    frontier = of_protocol(frontiers, compared(protocol), path)
    own, before = (_value(frontier, of, path) for of in (measurements, sparse))
    try:
        inside = offset_of(frontier.points, sparsity, before.value)
        plot = marked(frontier.plot, sparsity, own.value, inside if own.value == before.value else None)
        png = vegalite_to_png(plot)
    except (LookupError, TypeError, ValueError) as error:
        raise ReleaseError(f"{KEY}: {path} has a plot that is not of `make compare` ({error!r}), wanted one that is") from None
    return Picture(digest=digest, png=png, data=data, markdown=_markdown(frontier, own, inside is not None))


def _without_counts(content: Any) -> Any:
    """Frontiers as they are kept; earlier versions kept the number of their experiments with them."""
    if not isinstance(content, list):
        return content
    return [{key: value for key, value in one.items() if key != "experiments"} if isinstance(one, dict) else one for one in content]


def vegalite_to_png(plot: dict[str, Any]) -> bytes:
    """Draw a plot, which may load nothing: the file may be a stranger's."""
    import vl_convert

    return vl_convert.vegalite_to_png(json.dumps(plot), scale=SCALE, allowed_base_urls=[])


def of_protocol(frontiers: list[Frontier], own: dict[str, Any], path: Path) -> Frontier:
    """The frontier of a protocol.

    Raises:
        ReleaseError: there is none; names what differs from the nearest.
    """
    for frontier in frontiers:
        if frontier.protocol == own:
            return frontier
    nearest = min((differences(frontier.protocol, own) for frontier in frontiers), key=len, default={})
    named = [f"{key}: {shown(theirs)} there, {shown(ours)} here" for key, (theirs, ours) in list(nearest.items())[:NAMED]]
    named += [f"{len(nearest) - NAMED} more"] if len(nearest) > NAMED else []
    raise ReleaseError(
        f"{KEY}: found no experiment of this release's protocol in {path}, wanted some; the nearest differ in: "
        f"{'; '.join(named) or 'none'}; evaluate them by one protocol, then `make compare`"
    )


def _value(frontier: Frontier, measurements: Iterable[Measurement], path: Path) -> Measurement:
    key = (frontier.kind, frontier.name, frontier.metric)
    found = next((one for one in measurements if one.key == key and one.style == "raw"), None)
    if found is None:
        raise ReleaseError(f"{KEY}: found no {frontier.metric} of {frontier.name} among the results, wanted it as {path} has it")
    return found


def offset_of(points: list[dict[str, Any]], sparsity: float, value: float) -> float | None:
    """By how many pixels the point of a sparsity and a value, which may be rounded there, stands aside; None: there is none."""
    for row in points:
        if math.isclose(row["sparsity"], sparsity, abs_tol=1e-4) and math.isclose(row["value"], value, rel_tol=1e-6):
            return float(row["dodge"])
    return None


def marked(plot: dict[str, Any], sparsity: float, value: float, offset: float | None) -> dict[str, Any]:
    """The plot with a ring and words around a point. offset: of that point, if it is one of the plot's; else the point is drawn, too."""
    axes = {channel: plot["layer"][-1]["encoding"][channel] for channel in ("x", "y")}
    data = {"values": [{"sparsity": sparsity, "value": value, "words": "this release"}]}
    ring = {"type": "point", "filled": False, "size": 420, "stroke": INK, "strokeWidth": 2.5, "opacity": 1, "xOffset": offset or 0}
    point = {"type": "point", "filled": True, "size": 75, "color": INK, "opacity": 1}
    text = {"type": "text", "fontSize": 13, "fontWeight": "bold", "color": INK, "dy": -20, "xOffset": offset or 0}
    layers = [
        *([{"data": data, "mark": point, "encoding": axes}] if offset is None else []),
        {"data": data, "mark": ring, "encoding": axes},
        {"data": data, "mark": text, "encoding": {**axes, "text": {"field": "words", "type": "nominal"}}},
    ]
    return {**plot, "layer": [*plot["layer"], *layers]}


def _markdown(frontier: Frontier, own: Measurement, inside: bool) -> str:
    title = f"{own.label} on {own.name} against sparsity"
    among = f"among {counted(len(frontier.points), 'experiment')} of the same protocol" + ("" if inside else ", of which it is none")
    intervals = any(row["low"] is not None for row in frontier.points)
    over = "; lines through points are 95% intervals over text,\nnot over calibration seeds" if intervals else ""
    return (
        f"\n![{title}: this release {among}]({PICTURE})\n\n"
        f"{title[0].upper()}{title[1:]}: this release, ringed, {among}{over}. The broad\nline is these experiments' Pareto front. "
        f"Their numbers: [{DATA}]({DATA}).\n"
    )
