"""Answers of a hub that describe no repository, or one that would be written elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest

from stages.errors import SourceError
from stages.sources import hub
from tests.hub_server import COMMIT


def answer(**changes: Any) -> SimpleNamespace:
    lfs = SimpleNamespace(sha256="0" * 64)
    file = SimpleNamespace(**{"rfilename": "config.json", "size": 2, "lfs": lfs, **changes.pop("file", {})})
    return SimpleNamespace(**{"sha": COMMIT, "gated": False, "siblings": [file], "card_data": None, **changes})


def resolved(monkeypatch, found: object) -> hub.Repository:
    def repo_info(*_: object, **__: object) -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(repo_info=repo_info))
    return hub.resolve("org/tiny", "main", "model")


def test_an_answer_is_read(monkeypatch):
    assert resolved(monkeypatch, answer()).sizes == {"config.json": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha": "../../outside"}, 'found the commit "../../outside", wanted 40 or 64 hexadecimal digits'),
        ({"sha": None}, "found the commit null"),
        ({"file": {"rfilename": {"a": 1}}}, 'found the file {"a": 1} of 2 bytes, wanted a name, a size, a hash'),
        ({"file": {"size": -1}}, 'found the file "config.json" of -1 bytes'),
        ({"file": {"lfs": SimpleNamespace(sha256=7)}}, 'found the file "config.json"'),
        ({"card_data": SimpleNamespace(license={"a": 1})}, 'found the licence {"a": 1} on its card, wanted a name'),
    ],
)
def test_what_a_hub_cannot_mean_is_named(monkeypatch, changes, message):
    with pytest.raises(SourceError, match=f"hub model org/tiny: {message}"):
        resolved(monkeypatch, answer(**changes))


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), KeyError("x"), AttributeError("x"), RecursionError("x")])
def test_an_answer_of_another_form_is_named(monkeypatch, error):
    with pytest.raises(SourceError, match="hub model org/tiny: found an answer that describes no repository"):
        resolved(monkeypatch, error)
