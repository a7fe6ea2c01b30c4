"""Stages that have nothing to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.config.entry import Idle
from stages.release.sent import Sent
from tests.project import ENVIRONMENT, ROOT

NOTHING = {
    "observe": ("prune.statistics = none", "artifacts/statistics/manifest.json", {"statistics": "none"}),
    "evaluate_quantised": ("ruler.types = []", "results/ruler/measurements.json", []),
    "evaluate_float8": ("publish.dtype = base", "results/float8/measurements.json", []),
    "upload": ("publish.hub.repo = null", "results/upload.json", Sent(repo=None).as_dict()),
}


def params() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def run(stage: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("stage", NOTHING)
def test_a_stage_with_nothing_to_do_records_that_and_imports_no_library_that_takes_seconds(stage, tmp_path):
    idle = params()
    idle["publish"]["hub"]["repo"], idle["ruler"] = None, {**idle["ruler"], "types": []}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(idle))
    done = run(stage, tmp_path)
    assert done.returncode == 0, done.stderr
    why, path, expected = NOTHING[stage]
    assert done.stdout == f"{why}: nothing to do\n"
    assert json.loads((tmp_path / path).read_text()) == expected
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "stages.config.entry" in imported
    assert not imported & {"torch", "hydra", "transformers", "datasets"}


def write(directory: Path, monkeypatch: pytest.MonkeyPatch, hub: object) -> None:
    monkeypatch.chdir(directory)
    (directory / "params.yaml").write_text(yaml.safe_dump({"publish": {"hub": hub}}))


IDLE = Idle("publish.hub.repo", None, lambda: None, frozenset({"private"}))


@pytest.mark.parametrize(
    ("hub", "idle"),
    [
        ({"repo": None, "private": True}, True),
        ({"repo": "someone/model", "private": True}, False),
        ({"repo": None, "privat": True}, False),  # refused by the check of all sections
        ({"repo": None}, False),
        ({"private": True}, False),
        ({"repo": 0, "private": True}, False),
        (["repo"], False),
        (None, False),
    ],
)
def test_it_is_idle_where_its_section_is_whole_and_says_so(hub, idle, tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, hub)
    assert IDLE.is_now() == idle


def test_a_value_of_another_type_is_not_the_value(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, {"repo": 0})
    assert not Idle("publish.hub.repo", False, lambda: None).is_now()


@pytest.mark.parametrize("text", [None, "a: b: c", "publish: {hub: {repo: null, repo: null}}", "- repo"])
def test_what_cannot_be_read_is_left_to_the_check_of_all_sections(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    assert not IDLE.is_now()


def test_a_misspelled_key_of_a_section_that_no_other_stage_reads_is_refused(tmp_path):
    bad = params()
    bad["publish"]["hub"] = {"repo": None, "reppo": "someone/model", "private": True, "existing": False, "dry_run": False}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(bad))
    done = run("upload", tmp_path)
    assert done.returncode == 1
    assert "reppo" in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


def test_the_command_line_is_read_as_ever(tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params()))
    done = run("upload", tmp_path, "publish.hub.repo=no-name-of-a-repository")
    assert done.returncode == 1
    assert "publish.hub.repo" in done.stdout + done.stderr
