"""The picture of a card: this release among the experiments of its protocol.

`make compare` writes frontier.json next to its page: for each protocol the frontier of its first metric, as a Vega-Lite plot that holds its
data. publish.frontier is the SHA-256 of that file, so that which experiments a picture shows is stated as every other choice is.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import ReleaseError
from stages.evaluation.protocol import compared, differences
from stages.files import FRONTIER, read_json, sha256
from stages.plain_data import of_type
from stages.release.records import Records

PICTURE = "frontier.png"
SCALE = 2  # pixels of the picture for each of the plot
NAMED = 4  # keys of a protocol that an error names
INK = "#1d2126"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What frontier.json has of a protocol.

    protocol: what is compared of it. kind, name, metric: of the measurements that the plot is of, see Measurement.key. experiments: how
    many it shows. plot: as Vega-Lite with data.
    """

    protocol: dict[str, Any]
    kind: str
    name: str
    metric: str
    experiments: int
    plot: dict[str, Any]


def read_frontier(digest: str, records: Records) -> Frontier:
    """The frontier of the protocol that a release was evaluated by.

    Args:
        digest: the SHA-256 of the file. records: of the release.

    Raises:
        ReleaseError: the file is not there or is another, or is not what `make compare` writes; or it has no experiment of this protocol:
            names what differs.
        SparsesweepError: the file is not JSON.
    """
    remedy = "`make compare` writes it, and a release that has its picture has it, too"
    if not FRONTIER.is_file():
        raise ReleaseError(f"publish.frontier: found no {FRONTIER}, wanted the file with SHA-256 {digest}; {remedy}")
    if (found := sha256(FRONTIER)) != digest:
        raise ReleaseError(f"publish.frontier: found {FRONTIER} with SHA-256 {found}, wanted {digest}; {remedy}")
    try:
        frontiers: list[Frontier] = of_type(list[Frontier], read_json(FRONTIER), str(FRONTIER))
    except ValueError as error:
        raise ReleaseError(f"publish.frontier: {error}; {remedy}") from None
    own = compared(records.protocol)
    for frontier in frontiers:
        if frontier.protocol == own:
            return frontier
    differing = [list(differences(frontier.protocol, own)) for frontier in frontiers]
    nearest = min(differing, key=len, default=[])
    raise ReleaseError(
        f"publish.frontier: found no experiment of this release's protocol in {FRONTIER}, wanted some; the nearest differ in "
        f"{', '.join(nearest[:NAMED])}"
    )


def write_frontier(release: Path, frontier: Frontier, sparsity: float, records: Records) -> str:
    """Draw the frontier with the release marked, and keep its data in the release.

    Returns:
        Markdown for the card.

    Raises:
        ReleaseError: the release was not scored by the frontier's metric, or its plot cannot be drawn.
    """
    import vl_convert

    key = (frontier.kind, frontier.name, frontier.metric)
    own = next((one for one in records.sparse if one.key == key and one.style == "raw"), None)
    if own is None:
        raise ReleaseError(f"publish.frontier: found no {' of '.join(key[:0:-1])} among the results, wanted it to mark the release")
    try:
        plot = marked(frontier.plot, sparsity, own.value)
        (release / PICTURE).write_bytes(vl_convert.vegalite_to_png(json.dumps(plot), scale=SCALE, allowed_base_urls=[]))
    except (LookupError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"publish.frontier: {FRONTIER} has a plot that is not of `make compare` ({error!r}), wanted one that is"
        ) from None
    (release / FRONTIER.name).write_bytes(FRONTIER.read_bytes())
    what = f"{own.label} on {own.name} against sparsity"
    return (
        f"\n![{what}: this release among {frontier.experiments} experiments]({PICTURE})\n\n"
        f"{what[0].upper()}{what[1:]}: this release, ringed, among {frontier.experiments} experiments of the same protocol, with 95% "
        f"intervals over text (not over\ncalibration seeds) and the Pareto front. Their numbers: [{FRONTIER.name}]({FRONTIER.name}).\n"
    )


def marked(plot: dict[str, Any], sparsity: float, value: float) -> dict[str, Any]:
    """The plot with a ring and words around a point; where the point is one of the plot's, around that, which may stand a little aside."""
    places = {channel: plot["layer"][-1]["encoding"][channel] for channel in ("x", "y")}
    same = [row["dodge"] for row in plot["datasets"]["points"] if is_at(row, sparsity, value)]
    aside = same[0] if same else 0
    data = {"values": [{"sparsity": sparsity, "value": value, "words": "this release"}]}
    ring = {"type": "point", "filled": False, "size": 420, "stroke": INK, "strokeWidth": 2.5, "opacity": 1, "xOffset": aside}
    text = {"type": "text", "fontSize": 13, "fontWeight": "bold", "color": INK, "dy": -20, "xOffset": aside}
    layers = [
        {"data": data, "mark": ring, "encoding": places},
        {"data": data, "mark": text, "encoding": {**places, "text": {"field": "words", "type": "nominal"}}},
    ]
    return {**plot, "layer": [*plot["layer"], *layers]}


def is_at(row: dict[str, Any], sparsity: float, value: float) -> bool:
    """Whether a point of a plot, whose numbers may be rounded, has a sparsity and a value."""
    return math.isclose(row["sparsity"], sparsity, abs_tol=1e-4) and math.isclose(row["value"], value, rel_tol=1e-6)
