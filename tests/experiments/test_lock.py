"""Which outputs of an experiment are of another run."""

import subprocess
from hashlib import md5
from pathlib import Path

import pytest
import yaml

from stages.experiments.lock import other_run, part_of_directory, read_lock
from tests.project import ENVIRONMENT


def lock(**changed: object) -> dict:
    """Of two stages: prune, and the evaluation of what it wrote."""
    return {
        "prune": {"params": {"params.yaml": {"pattern": {"sparsity": 0.5}}}, "outs": [{"path": "sparse", "md5": "a"}]},
        "evaluate": {
            "params": {"params.yaml": {"environment.torch": "2.0", "evaluation": {"rows": 3}}},
            "deps": [{"path": "sparse", "md5": "a"}, {"path": "stages/evaluate.py", "md5": "c"}],
        },
        **changed,
    }


PARAMS = {"pattern": {"sparsity": 0.5}, "environment": {"torch": "2.0"}, "evaluation": {"rows": 3}}


def test_an_experiment_that_ran_all_stages_is_one_run():
    assert other_run(lock(), PARAMS, "evaluate") is None


def test_scores_of_what_another_run_pruned_are_of_another_run():
    pruned = {"params": {"params.yaml": {"pattern": {"sparsity": 0.5}}}, "outs": [{"path": "sparse", "md5": "b"}]}
    assert other_run(lock(prune=pruned), PARAMS, "evaluate") == "evaluate read another sparse than prune wrote"
    assert other_run(lock(prune=pruned), PARAMS, "prune") is None


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"pattern": {"sparsity": 0.6}}, "prune read pattern={'sparsity': 0.5}, and the experiment has {'sparsity': 0.6}"),
        ({"environment": {"torch": "2.1"}}, "evaluate read environment.torch=2.0, and the experiment has 2.1"),
        ({"environment": {}}, "evaluate read environment.torch=2.0, and the experiment has None"),
    ],
)
def test_scores_by_other_parameters_are_of_another_run(section, reason):
    assert other_run(lock(), PARAMS | section, "evaluate") == reason


def test_a_lock_is_read_as_dvc_wrote_it(tmp_path, monkeypatch):
    values = "{a: 1e-05, b: 2:4, c: off, d: 0.5, e: 3, f: true, g: null, h: '1', i: 2026-01-01, j: }"
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  prune: {values}\n")
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-q", "-m", "A lock"]):
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    monkeypatch.chdir(tmp_path)
    wanted = {"a": 1e-5, "b": "2:4", "c": "off", "d": 0.5, "e": 3, "f": True, "g": None, "h": "1", "i": "2026-01-01", "j": None}
    assert read_lock("HEAD") == {"prune": wanted}


def test_a_part_of_a_directory_is_compared_by_what_is_in_it(tmp_path):
    """By DVC's own hashes of the directory and of the part."""
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    for name, text in (("text/a/one.txt", "one"), ("text/b/two.txt", "two"), ("text/b/deep/three.txt", "three")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = "python -c \"open('read', 'w')\""
    stages = {"write": {"cmd": "true", "outs": ["text"]}, "read": {"cmd": command, "deps": ["text/b"], "outs": ["read"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    subprocess.run(["dvc", "commit", "-q", "--force", "write"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    subprocess.run(["dvc", "repro", "-q", "read"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    found = yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]
    cache = tmp_path / ".dvc/cache"
    assert other_run(found, {}, "read", cache) is None
    (entry,) = [entry for entry in found["read"]["deps"] if entry["path"] == "text/b"]
    assert part_of_directory(cache, found["write"]["outs"][0]["md5"], Path("b")) == entry["md5"]
    assert part_of_directory(cache, found["write"]["outs"][0]["md5"], Path("a/one.txt")) == md5(b"one").hexdigest()
    entry["md5"] = "0" * 32 + ".dir"
    assert other_run(found, {}, "read", cache) == "read read another text/b than write wrote"
    assert other_run(found, {}, "read", tmp_path / "empty") is None  # it cannot be told
