"""A project like this one whose stages compute nothing: they wait, and write plausible results. For sweeps of many points, and drills.

Configuration, code and the graph of stages are this repository's; only what each stage executes is another. A stage waits for
STAND_IN_SECONDS, and while the file that STAND_IN_HELD names is there if it is the stage STAND_IN_HOLDS; prune fails at the sparsity
STAND_IN_FAILS. The perplexity of sparsity s is 1 / (1 - s) times the dense model's.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from benchmarks.unconfigured import ENVIRONMENT

ROOT = Path(__file__).parents[1]
COPIED = ("conf", "stages", "hydra_plugins", "tasks", "params.yaml", ".gitignore", ".dvc/.gitignore")
CONFIG = """[core]
    analytics = false
    remote = shared
[hydra]
    enabled = true
[exp]
    git_remote = origin
[cache]
    type = "reflink,hardlink,symlink,copy"
['remote "shared"']
    url = {remote}
    verify = true
"""
STAGE = Path(__file__).with_name("stand_in_stage.py")


def make(directory: Path) -> Path:
    """A clone to run sweeps in, with a git remote and a DVC remote beside it.

    Args:
        directory: in which all three are made.
    """
    root = directory / "project"
    listed = _git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "--", *COPIED).splitlines()
    for name in listed:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copy(STAGE, root / "stage.py")
    described = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf8"))["stages"]
    stages = {name: _stage(name, stage) for name, stage in described.items()}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf8")
    (root / "dvc.lock").write_text("schema: '2.0'\n", encoding="utf8")
    _git(root, "init", "--quiet", "--initial-branch", "main")
    (directory / "remote").mkdir()
    (root / ".dvc/config").write_text(CONFIG.format(remote=directory / "remote"), encoding="utf8")
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", "A project that waits")
    _git(directory, "init", "--quiet", "--bare", "--initial-branch", "main", "origin.git")
    _git(root, "remote", "add", "origin", str(directory / "origin.git"))
    _git(root, "push", "--quiet", "origin", "main")
    return root


def _stage(name: str, stage: dict[str, Any]) -> dict[str, Any]:
    """The same stage, which executes the stand-in and depends on no other code."""
    outs = [*stage.get("outs", []), *stage.get("metrics", [])]
    deps = ["stage.py", *(path for path in stage["deps"] if path.startswith(("artifacts", "results")))]
    return {**stage, "cmd": " ".join(["python stage.py", name, *outs]), "deps": deps}


def _git(directory: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
