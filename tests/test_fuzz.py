"""A few hundred damaged and hostile inputs for every reader; `python -m benchmarks.fuzz` has 100,000."""

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.fuzz import READERS
from benchmarks.fuzz.__main__ import DOCUMENT, FILE, INPUTS, table
from benchmarks.fuzz.guard import SECRETS, Fault, prepared
from benchmarks.fuzz.tally import feed
from stages.errors import SourceError
from stages.files import read_json
from tests.project import ROOT

SLOW = {"GGUF files": 40, "params.yaml": 40, "task files of one's own": 40, "wheels and what is in them": 100, "answers of a hub": 40}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_reader_takes_or_refuses_whatever_it_is_given(reader, capsys):
    tally = feed(reader, SLOW.get(reader.name, 200), first_seed=0)
    assert not tally.faults, capsys.readouterr().err
    assert tally.refused
    assert tally.accepted


@pytest.fixture()
def guard(tmp_path):
    with prepared(tmp_path) as made:
        made.warm = True
        yield made


def refuse(message: str):
    def read() -> None:
        raise SourceError(message)

    return read


def run(guard, read, memory: int = 2**26) -> None:
    guard.run({"a/b.txt": b"river"}, read, names=("b.txt",), memory=memory)


def test_what_is_taken_and_what_is_refused_with_a_name_is_no_fault(guard):
    run(guard, lambda: Path("a/c.txt").write_text("stone"))
    run(guard, refuse("b.txt: no"))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: {}["x"], "KeyError"),
        (refuse("no"), "the message names none of b.txt"),
        (refuse(f"b.txt {SECRETS['HF_TOKEN']}"), "HF_TOKEN was printed or written"),
        (lambda: print(os.environ["HF_TOKEN"]), "HF_TOKEN was printed or written"),
        (lambda: Path("a/c.txt").write_text(os.environ["HF_TOKEN"]), "HF_TOKEN was printed or written"),
        (lambda: Path("../outside").write_text("x"), "opened .*outside.* for writing"),
        (lambda: Path("a/b.txt").rename("../outside"), "os.rename of .*outside"),
        (lambda: subprocess.run(["true"]), "subprocess.Popen 'true'"),
        (lambda: exec(compile("1", str(Path("a/b.txt").absolute()), "exec")), "executed .*b.txt"),
        (lambda: bytearray(b"x") * 2**27, "memory grew by 1.. MiB, wanted at most 64 MiB"),
    ],
)
def test_a_fault_of_each_kind_is_seen(guard, read, message):
    with pytest.raises(Fault, match=message):
        run(guard, read)


def test_a_reader_that_hangs_is_stopped(guard, monkeypatch):
    monkeypatch.setattr("benchmarks.fuzz.guard.DEADLINE", 0.2)

    def spin() -> None:
        while True:
            pass

    with pytest.raises(Fault, match="it was not done after 0.2 s"):
        run(guard, spin)


def test_the_table_of_the_document_is_that_of_the_last_run():
    rows = read_json(ROOT / FILE)
    assert table(rows) in (ROOT / DOCUMENT).read_text()
    assert [row["reader"] for row in rows] == [reader.name for reader in READERS]
    assert sum(row["inputs"] for row in rows) >= INPUTS
    assert not any(row["faults"] for row in rows)
