import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.hub_server import FakeRepository, Hub

HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.endpoint  # before huggingface_hub is imported: no test can reach another hub
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")  # no token and no cached file of the user's
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DVC_NO_ANALYTICS"] = "1"

import pytest
import torch

from stages.checkpoint.reader import Checkpoint
from stages.sources import base as checkpoints
from stages.sources.base import LocalBase
from tests import tiny

torch.set_num_threads(1)


LONGEST = ("test_sharing", "test_pipeline", "test_making", "test_faults", "test_cluster", "test_local", "test_zephyr")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest run first, so that no process waits for another at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """No test loses power, and on a busy machine each fsync of a journal may take seconds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A small checkpoint as it would lie in someone's directory."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def canonical(source, tmp_path_factory) -> Path:
    """The same, fetched."""
    directory = tmp_path_factory.mktemp("base")
    local = LocalBase(source="local", path=str(source), name="tests/tiny", fingerprint=None, license="mit")
    checkpoints.fetch(local, directory, downloads=directory / "unused")
    return directory


@pytest.fixture()
def base(canonical) -> Checkpoint:
    return Checkpoint(canonical)


@pytest.fixture()
def hub_repository():
    """Put a repository on the loopback hub: name ("ORG/NAME", or "datasets/ORG/NAME") and FakeRepository's fields."""

    def put(name: str, files: dict[str, bytes], **facts: object) -> FakeRepository:
        HUB.repositories[name] = FakeRepository(files=files, **facts)
        return HUB.repositories[name]

    yield put
    HUB.repositories.clear()
