"""Frontiers that a card draws, perhaps from a stranger's release: drawn only where their hash is stated.

All but the renderer is fed: V8 wants more address space than a case has.
"""

import hashlib
import tempfile
from contextlib import chdir
from functools import cache
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz.mutations import Files, json_of
from benchmarks.fuzz.reader import Reader
from stages.evaluation.measurement import from_rows
from stages.experiments.page.writing import keep_frontiers
from stages.files import FRONTIERS, parsed_json
from stages.release.frontier import draw
from tests.experiments import synthetic

GROUP = synthetic.group()
FILE = "frontiers.json"


@cache
def _kept() -> Any:
    """What `make compare` keeps of a few experiments."""
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        return parsed_json((FRONTIERS / f"{keep_frontiers([GROUP])}.json").read_bytes())


def frontiers() -> SearchStrategy[Files]:
    return st.deferred(lambda: json_of(_kept())).map(lambda content: {FILE: content})


def draw_frontier(files: Files) -> None:
    digest, details = hashlib.sha256(files[FILE]).hexdigest(), GROUP.results[0]
    FRONTIERS.mkdir()
    (FRONTIERS / f"{digest}.json").write_bytes(files[FILE])
    measured = from_rows(details.measurements)
    protocol = {**details.experiment.protocol, "evaluation": {}, "delta": "d"}
    with mock.patch("stages.release.frontier.vegalite_to_png", return_value=b""):
        draw(digest, protocol, measured, sparsity=details.sparsity, sparse=measured)


READERS = (
    Reader(
        name="frontiers of cards, up to the renderer",
        code="release/frontier.py",
        inputs=frontiers(),
        read=draw_frontier,
        names=("publish.frontier",),
        share=2,
    ),
)
