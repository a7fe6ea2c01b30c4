"""The picture of a card: the frontier that was compared, with the release marked."""

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from stages.errors import ReleaseError
from stages.evaluation.measurement import from_rows
from stages.experiments.page.writing import keep_frontiers
from stages.files import FRONTIERS
from stages.release.frontier import Frontier, draw, marked, offset_of
from tests.experiments import synthetic

RELEASED = 3  # its number among the experiments of the second protocol


@pytest.fixture()
def groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [synthetic.other_group(), synthetic.group()]


def drawn(groups, digest=None, **facts):
    """The picture of an experiment of the second protocol."""
    details = groups[1].results[RELEASED]
    measured = from_rows(details.measurements)
    known = {"protocol": {**details.experiment.protocol, "evaluation": {}, "delta": "d"}, "measurements": measured, "sparse": measured}
    return draw(digest or keep_frontiers(groups), **{**known, "sparsity": details.sparsity, **facts})


def kept(digest: str) -> list[Frontier]:
    return [Frontier(**one) for one in json.loads((FRONTIERS / f"{digest}.json").read_text())]


def keep(content: object) -> str:
    """Keep another content, as `make compare` would; its hash."""
    data = json.dumps(content).encode()
    digest = hashlib.sha256(data).hexdigest()
    FRONTIERS.mkdir(exist_ok=True)
    (FRONTIERS / f"{digest}.json").write_bytes(data)
    return digest


def test_the_picture_shows_the_release_among_the_experiments_of_its_protocol(groups, tmp_path):
    picture = drawn(groups)
    count = len(groups[1].results)
    assert f"this release, ringed, among {count} experiments of the same protocol; lines" in picture.markdown
    assert "(frontier.png)" in picture.markdown
    assert picture.png.startswith(b"\x89PNG")
    assert int.from_bytes(picture.png[16:20]) > 1000  # pixels wide
    picture.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"frontier.png", "frontiers.json", "frontiers"}
    assert hashlib.sha256((tmp_path / "frontiers.json").read_bytes()).hexdigest() == picture.digest
    assert picture.kept_again == f"mkdir -p frontiers && cp RELEASE/frontiers.json frontiers/{picture.digest}.json"


def test_the_same_experiments_are_kept_once(groups):
    assert keep_frontiers(groups) == keep_frontiers(groups)
    assert len(list(FRONTIERS.iterdir())) == 1


def test_the_ring_is_around_the_releases_own_point(groups):
    frontier = kept(keep_frontiers(groups))[1]
    plot = frontier.plot
    row = next(row for row in frontier.points if row["dodge"] != 0)
    offset = offset_of(frontier.points, row["sparsity"], row["value"])
    assert offset == row["dodge"]
    ring, words = marked(plot, row["sparsity"], row["value"], offset)["layer"][len(plot["layer"]) :]
    assert ring["mark"]["xOffset"] == words["mark"]["xOffset"] == row["dodge"]
    assert ring["data"]["values"] == [{"sparsity": row["sparsity"], "value": row["value"], "words": "this release"}]


def test_a_release_that_is_none_of_the_points_has_one_of_its_own(groups):
    frontier = kept(keep_frontiers(groups))[1]
    plot = frontier.plot
    assert offset_of(frontier.points, 0.55, 30.0) is None
    point, ring, _ = marked(plot, 0.55, 30.0, None)["layer"][len(plot["layer"]) :]
    assert (point["mark"]["filled"], ring["mark"]["xOffset"]) == (True, 0)
    assert "of the same protocol, of which it is none" in drawn(groups, sparsity=0.55).markdown


def test_a_rounded_release_is_marked_at_its_own_score(groups, monkeypatch):
    seen = []
    monkeypatch.setattr("stages.release.frontier.vegalite_to_png", lambda plot: seen.append(plot) or b"")
    sparse = from_rows(groups[1].results[RELEASED].measurements)
    drawn(groups, measurements=[replace(one, value=1.5 * one.value) for one in sparse], sparse=sparse)
    (value,) = [layer["data"]["values"][0]["value"] for layer in seen[0]["layer"][-1:]]
    assert value == pytest.approx(1.5 * sparse[0].value)


def test_a_file_that_an_earlier_version_kept_is_read(groups):
    content = [{**json.loads(json.dumps(asdict(one))), "experiments": 3} for one in kept(keep_frontiers(groups))]
    assert drawn(groups, keep(content)).png.startswith(b"\x89PNG")


def test_another_file_is_refused_and_so_is_none(groups):
    digest = keep_frontiers(groups)
    (FRONTIERS / f"{digest}.json").write_text("[]")
    with pytest.raises(ReleaseError, match=f"publish.frontier: found frontiers/{digest}.json with SHA-256 .*, wanted {digest}; `make comp"):
        drawn(groups, digest)
    (FRONTIERS / f"{digest}.json").unlink()
    with pytest.raises(ReleaseError, match=f"publish.frontier: frontiers/{digest}.json: not found; `make compare` keeps such a file"):
        drawn(groups, digest)


def test_experiments_of_another_protocol_are_refused_by_what_differs(groups):
    protocol = groups[1].results[RELEASED].experiment.protocol | {"dtype": "float16"}
    message = (
        'found no experiment of this release.s protocol in .*; the nearest differ in: dtype: null there, "float16" here; evaluate them'
    )
    with pytest.raises(ReleaseError, match=message):
        drawn(groups, protocol=protocol)


def test_a_release_without_the_metric_is_refused(groups):
    with pytest.raises(ReleaseError, match="publish.frontier: found no perplexity of wikipedia among the results, wanted it as frontiers/"):
        drawn(groups, measurements=[])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer": []}, "found .*, wanted list"),
        ([], "the nearest differ in: none; evaluate"),
        ([{"protocol": {}}], r'\[0\]: found "protocol", wanted the keys of a Frontier; missing: kind'),
    ],
)
def test_a_file_of_another_shape_is_refused(groups, content, message):
    with pytest.raises(ReleaseError, match=f"publish.frontier: .*{message}"):
        drawn(groups, keep(content))


@pytest.mark.parametrize(
    "change",
    [
        {"layer": []},
        {"datasets": {}},
        {"mark": {"type": "guess"}, "layer": [{"encoding": {"x": 1, "y": 2}}]},
        {"layer": [{"data": {"url": "http://127.0.0.1:9/x"}, "mark": "point", "encoding": {"x": {"field": "a"}, "y": {"field": "b"}}}]},
    ],
    ids=["without layers", "without points", "not of Vega", "that loads"],
)
def test_a_plot_that_cannot_be_drawn_is_refused(groups, change):
    first, second = kept(keep_frontiers(groups))
    digest = keep([asdict(first), asdict(replace(second, plot=second.plot | change))])
    with pytest.raises(ReleaseError, match="publish.frontier: frontiers/.* has a plot that is not of `make compare`"):
        drawn(groups, digest)
