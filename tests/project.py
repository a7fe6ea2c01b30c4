"""A clone of this repository whose configuration names small local files: the real pipeline, in about a minute."""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks import unconfigured
from stages.files import sha256
from tests import tiny

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**unconfigured.ENVIRONMENT, "PYTHONWARNINGS": "default"}
HASH_SEED = "PYTHONHASHSEED"
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process of a clone compiles its code anew


# Files of which a user may have another version, as a fresh clone of the template has them.
OWN = {
    "dvc.lock": "schema: '2.0'\n",
    ".dvc/config": "[core]\n    analytics = false\n[hydra]\n    enabled = true\n[exp]\n    git_remote = origin\n"
    '[cache]\n    type = "reflink,hardlink,symlink,copy"\n',
}


@cache
def commands() -> Path:
    """A directory with `python` and `dvc` that begin with their libraries imported, see forked."""
    directory = Path(tempfile.mkdtemp(prefix="commands-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    address, programs = directory / "socket", Path(sys.executable).parent
    for name, module in {"python": None, "dvc": "dvc"}.items():
        text = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom forked import command; "
        text += f"command({str(address)!r}, {str(programs / name)!r}, {module!r})\n"
        (directory / name).write_text(f"#!{sys.executable} -IS\n{text}")
        (directory / name).chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/forked.py"), str(address)],
        env={name: value for name, value in ENVIRONMENT.items() if name not in ("PYTHONPATH", HASH_SEED)},
        stdin=subprocess.PIPE,  # the server ends with this process
        start_new_session=True,
    )
    atexit.register(server.kill)
    while not address.exists():
        assert server.poll() is None, "the server of forks ended, see above"
        time.sleep(0.02)
    return directory


@dataclass
class Project:
    """A clone to run commands in."""

    root: Path

    def run(self, *command: str, fails: bool = False) -> str:
        """Output of a command, which must succeed, or must fail."""
        done = subprocess.run(
            ["python" if word == sys.executable else word for word in command],
            cwd=self.root,
            env={**ENVIRONMENT, "PATH": f"{commands()}{os.pathsep}{ENVIRONMENT['PATH']}"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, f"{' '.join(command)} exited with {done.returncode}:\n{output}"
        return output

    def killed_once(self, path: str, *command: str) -> bool:
        """Run a command and kill it, with all its children, as soon as `path` is there; whether it came to that."""
        process = subprocess.Popen(
            command, cwd=self.root, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None:
            if (self.root / path).exists():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return True
        return False

    def stages_run(self, *command: str) -> list[str]:
        """Which stages a DVC command executed, in order."""
        return re.findall(r"Running stage '([^']+)'", self.run("dvc", *command))

    def changed_stages(self) -> set[str]:
        """Stages of which DVC says that a dependency, a parameter or the command changed."""
        import json

        status = json.loads(self.run("dvc", "status", "--json"))
        return {name for name, changes in status.items() if any("changed" in str(key) for change in changes for key in change)}


def _yaml(path: Path, text: str) -> None:
    path.write_text(text)


def _corpora(directory: Path, conf: Path) -> None:
    """Small corpora and benchmark rows, and the group files that name them."""
    words = tiny.sentences(12, seed=3, length=8)
    rows = {
        "tiny_pages": [{"text": text} for text in tiny.sentences(40, seed=4, length=120)],
        "tiny_articles": [{"text": text} for text in tiny.sentences(40, seed=5)],
        "boolq": [{"question": words[i], "passage": words[-1], "idx": i, "label": i % 2} for i in range(8)],
        "piqa": [{"goal": words[i], "sol1": "lamp", "sol2": "river", "label": i % 2} for i in range(8)],
    }
    for name, lines in rows.items():
        path = tiny.write_lines(directory / f"{name}.jsonl", lines)
        facts = f"source: local, path: {path}, sha256: {sha256(path)}, license: cc0-1.0"
        file = name if name.startswith("tiny") else f"tiny_{name}"
        _yaml(conf / "text" / f"{file}.yaml", f"defaults: [data_file@{name}, _self_]\n{name}: {{{facts}}}\n")


def write_configuration(root: Path, data: Path) -> None:
    """What a user writes to add a base, a corpus and presets: a few lines of YAML each."""
    conf = root / "conf"
    checkpoint = tiny.write_checkpoint(data / "checkpoint")
    _corpora(data, conf)
    base = f"source: local\npath: {checkpoint}\nname: tests/tiny-zephyr\nfingerprint: null\nlicense: mit\n"
    _yaml(conf / "base/tiny.yaml", f"defaults: [local_schema, _self_]\n{base}")
    _yaml(
        conf / "calibration/tiny.yaml",
        "defaults: [calibration_schema, /text@_global_.text.calibration: [tiny_pages], _self_]\n"
        "name: tiny\nwindows: 6\nheld_out: 2\nwindow_length: 64\nbos: auto\nseed: 0\noverlap_tokens: 13\nmax_overlap: 0\nmax_refused: 0.0\n"
        "sources: {tiny_pages: {sampler: document, weight: 1.0}}\n",
    )
    _yaml(
        conf / "evaluation/tiny.yaml",
        "defaults: [/text@_global_.text.evaluation: [tiny_articles, tiny_boolq, tiny_piqa], _self_]\n"
        "name: tiny\ndevice: auto\ndtype: auto\nbos: auto\n"
        "corpora: {tiny_articles: {window_length: 64, windows: 4, evenly: false}}\nmetrics: [perplexity, divergence]\n"
        "tasks: [boolq, piqa]\nrows: 4\nfew_shot: null\nstyles: [raw]\nexamples: 2\nsystem_prompt: Be brief.\n"
        "batch_size: 4\nstreamed: false\ngenerations: {new_tokens: 3, prompts: [river stone]}\n",
    )
    _yaml(
        conf / "experiment/tiny.yaml",
        "# @package _global_\ndefaults: [override /base: tiny, override /calibration: tiny, override /evaluation: tiny]\n",
    )


def make(directory: Path) -> Project:
    """A clone with an origin and a shared DVC remote, both directories on this machine."""
    origin, project = directory / "origin.git", Project(directory / "a")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and name not in OWN:
            (project.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project.root / name)
    for name, text in OWN.items():
        _yaml(project.root / name, text)
    write_configuration(project.root, directory / "data")
    project.run("git", "init", "-q", "-b", "main")
    project.run("dvc", "remote", "add", "-q", "-d", "shared", str(directory / "remote"))
    project.run("dvc", "remote", "modify", "-q", "shared", "verify", "true")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "A small project")
    project.run("git", "init", "-q", "--bare", "-b", "main", str(origin))
    project.run("git", "remote", "add", "origin", str(origin))
    project.run("git", "push", "-q", "origin", "main")
    return project


def clone(project: Project, directory: Path) -> Project:
    project.run("git", "clone", "-q", str(project.root.with_name("origin.git")), str(directory))
    return Project(directory)
