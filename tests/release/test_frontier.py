"""The picture of a card: the frontier that was compared, with the release marked."""

import json
from dataclasses import replace

import pytest

from stages.errors import ReleaseError
from stages.evaluation.measurement import from_rows
from stages.experiments.page.writing import first_frontier
from stages.files import FRONTIER, sha256, write_json
from stages.release import frontier
from stages.release.frontier import marked, read_frontier, write_frontier
from tests.experiments import synthetic


class Recorded:
    """What of a release's records the picture reads."""

    def __init__(self, group) -> None:
        self.details = group.results[0]
        self.protocol = {**self.details.experiment.protocol, "evaluation": {}, "delta": "d"}
        self.sparse = from_rows(self.details.measurements)


@pytest.fixture()
def compared(tmp_path, monkeypatch):
    """A directory with the frontiers of two protocols, and the records of an experiment of the second."""
    monkeypatch.chdir(tmp_path)
    groups = [synthetic.other_group(), synthetic.group()]
    FRONTIER.parent.mkdir()
    write_json(FRONTIER, [first_frontier(group) for group in groups])
    return Recorded(groups[1])


def test_the_picture_shows_the_release_among_the_experiments_of_its_protocol(compared, tmp_path):
    read = read_frontier(sha256(FRONTIER), compared)
    assert read.experiments == len(synthetic.group().results)
    said = write_frontier(tmp_path, read, compared.details.sparsity, compared)
    assert f"among {read.experiments} experiments of the same protocol" in said
    assert "(frontier.png)" in said
    picture = (tmp_path / "frontier.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) > 1000  # pixels wide
    assert json.loads((tmp_path / "frontier.json").read_text()) == json.loads(FRONTIER.read_text())


def test_the_ring_is_around_the_releases_own_point(compared):
    plot = read_frontier(sha256(FRONTIER), compared).plot
    row = next(row for row in plot["datasets"]["points"] if row["dodge"] != 0)
    ring, words = marked(plot, row["sparsity"], row["value"])["layer"][-2:]
    assert ring["mark"]["xOffset"] == words["mark"]["xOffset"] == row["dodge"]
    assert ring["data"]["values"] == [{"sparsity": row["sparsity"], "value": row["value"], "words": "this release"}]
    ring, _ = marked(plot, row["sparsity"], 2 * row["value"])["layer"][-2:]
    assert ring["mark"]["xOffset"] == 0


def test_another_file_is_refused_and_so_is_none(compared):
    digest = sha256(FRONTIER)
    FRONTIER.write_text("[]")
    with pytest.raises(ReleaseError, match=f"publish.frontier: found comparison/frontier.json with SHA-256 .*, wanted {digest}"):
        read_frontier(digest, compared)
    FRONTIER.unlink()
    with pytest.raises(ReleaseError, match=f"publish.frontier: found no comparison/frontier.json, wanted the file with SHA-256 {digest}"):
        read_frontier(digest, compared)


def test_experiments_of_another_protocol_are_refused_by_what_differs(compared):
    compared.protocol["dtype"] = "float16"
    with pytest.raises(ReleaseError, match="found no experiment of this release's protocol in .*; the nearest differ in dtype$"):
        read_frontier(sha256(FRONTIER), compared)


def test_a_release_without_the_metric_is_refused(compared, tmp_path):
    read = replace(read_frontier(sha256(FRONTIER), compared), metric="guess")
    with pytest.raises(ReleaseError, match="publish.frontier: found no guess of .* among the results"):
        write_frontier(tmp_path, read, 0.5, compared)
    assert not (tmp_path / frontier.PICTURE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer": []}, r"publish.frontier: comparison/frontier.json: found .*, wanted list"),
        ([{"protocol": {}}], r"comparison/frontier.json\[0\]: found "protocol", wanted the keys of a Frontier; missing: experiments, kind"),
    ],
)
def test_a_file_of_another_shape_is_refused_before_anything_is_written(compared, content, message):
    write_json(FRONTIER, content)
    with pytest.raises(ReleaseError, match=message):
        read_frontier(sha256(FRONTIER), compared)


@pytest.mark.parametrize(
    "change", [{"layer": []}, {"datasets": {}}, {"mark": {"type": "guess"}, "layer": [{"encoding": {"x": 1, "y": 2}}]}]
)
def test_a_plot_that_cannot_be_drawn_is_refused(compared, tmp_path, change):
    read = read_frontier(sha256(FRONTIER), compared)
    with pytest.raises(ReleaseError, match="publish.frontier: comparison/frontier.json has a plot that is not of `make compare`"):
        write_frontier(tmp_path, replace(read, plot=read.plot | change), 0.5, compared)
