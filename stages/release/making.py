"""The pipeline of dvc.yaml, run once for one model, without DVC; the release is all that is left of it.

Each stage runs as dvc.yaml says, in a directory of its own beside the release's. An interrupted run leaves that directory, and the same
command goes on in it: a stage that ended is not run again, and prune and evaluate go on within themselves. With other choices, another
version of the code or changed files of the model those stages run again that depend on them, as with DVC.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from tabulate import tabulate

from stages.checkpoint.reader import PROVENANCE
from stages.config.compose import composed
from stages.config.params import CONF
from stages.errors import ConfigError, SparsesweepError
from stages.files import (
    BASE,
    DENSE_RESULTS,
    FRONTIERS,
    OWN_TASKS,
    PRUNE_RESULTS,
    RELEASE,
    SPARSE_RESULTS,
    read_json,
    remove,
    sha256,
    write_json,
)
from stages.record import Stopwatch
from stages.release.licence import require_derivable
from stages.sources import hub
from stages.sweeps.pipeline import DVC_YAML, Stage, keys, stages_of

TARGET, FETCH = "publish", "fetch_base"
PARAMS = "params.yaml"
ENDED = "ended.json"  # in the directory of a run: of each stage that ended, the hash of what its result depends on
BEST = {"2:4": "2_4", "4:8": "4_8", "0.5": "50", "0.6": "60", "0.7": "70"}  # --sparsity -> of conf/experiment/best_*.yaml
PATTERNS = {"2:4": "nm_2_4", "4:8": "nm_4_8"}
QUALITIES = ("fast", "best")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What was asked for; see stages.make_release."""

    model: str
    out: Path
    quality: str
    sparsity: str
    revision: str | None = None
    license: str | None = None
    name: str | None = None
    overrides: list[str] = field(default_factory=list)


def make(order: Order) -> str:
    """Make the release; returns what came of it, in words.

    Raises:
        ConfigError: the model, the sparsity or a choice is none, or OUT is there already; nothing was run.
        ReleaseError: the base's licence forbids a release; nothing was run but, where it is the base that states it, its fetching.
        SparsesweepError: a stage failed; it has said why.
    """
    if order.out.exists() or order.out.is_symlink():
        raise ConfigError(f"{order.out}: found there already, wanted a path that is free for the release")
    stopwatch = Stopwatch()
    run = run_of(order)
    sections: Any = OmegaConf.to_container(composed(*overrides(order)))
    _make_absolute(sections)
    any_license = sections["publish"]["any_license"]
    if sections["base"]["license"] is not None:
        require_derivable(sections["base"]["license"], any_license=any_license)
    _prepare(run, sections)
    commands = list(_commands(sections))
    for number, command in enumerate(commands, start=1):
        _run(run, command, f"[{number}/{len(commands)}] {command.description}")
        if command.stage == FETCH:
            require_derivable(read_json(run / BASE / PROVENANCE)["license"], any_license=any_license)
    summary = _summary(run)
    (run / RELEASE).rename(order.out)
    remove(run)
    return f"{summary}\n\n{order.out}: the release, after {stopwatch.seconds / 60:.1f} minutes in all"


def run_of(order: Order) -> Path:
    """The directory of the run."""
    return order.out.absolute().with_name(f".{order.out.name}-run")


# What is run.


def overrides(order: Order) -> list[str]:
    """The choices, as for `dvc exp run -S`.

    Raises:
        ConfigError: the sparsity is no fraction and no pattern; the model is nothing that there is, or has no licence.
    """
    return [*_of_model(order), *_of_quality(order), *order.overrides]


def _of_quality(order: Order) -> list[str]:
    sparsity = order.sparsity
    if sparsity not in BEST:
        try:
            wanted = float(sparsity)
        except ValueError:
            raise ConfigError(f"--sparsity: found {sparsity!r}, wanted a fraction or one of {', '.join(PATTERNS)}") from None
        nearest = min((name for name in BEST if name not in PATTERNS), key=lambda name: abs(float(name) - wanted))
    else:
        nearest = sparsity
    chosen = [f"experiment=best_{BEST[nearest]}"] if order.quality == "best" else ["experiment=fast"]
    if sparsity not in PATTERNS:
        return [*chosen, f"pattern.sparsity={sparsity}"]
    return chosen if order.quality == "best" else [*chosen, f"pattern={PATTERNS[sparsity]}"]


def _of_model(order: Order) -> list[str]:
    path = Path(order.model)
    if (CONF / "base" / f"{order.model}.yaml").is_file():
        _require_unused(order, "a base of conf/base", "revision", "license", "name")
        return [f"base={order.model}"]
    if path.is_dir() or path.is_file():
        _require_unused(order, "a model on this disk", "revision")
    if path.is_dir():
        return ["base=local", *_own(order, path), f"base.path={_quoted(str(path.absolute()))}"]
    if path.is_file():
        return ["base=gguf", *_own(order, path), f"base.path={_quoted(str(path.absolute()))}", f"base.sha256={sha256(path)}"]
    if order.model.count("/") != 1:
        wanted = "ORG/NAME of a model hub, a directory, a GGUF file, or a base of conf/base"
        raise ConfigError(f"MODEL: found {order.model!r}, wanted {wanted}")
    _require_unused(order, "a model of a hub", "name")
    commit = _begun_with(order) or hub.resolve(order.model, order.revision or "main", "model").commit
    licence = [] if order.license is None else [f"base.license={_quoted(order.license)}"]
    return ["base=hub", f"base.repo={_quoted(order.model)}", f"base.revision={commit}", *licence]


def _begun_with(order: Order) -> str | None:
    """The commit of the model that an interrupted run took to be its newest; None: there is no such run, or a commit is named."""
    path = run_of(order) / PARAMS
    if order.revision is not None or not path.is_file():
        return None
    base = (yaml.safe_load(path.read_text(encoding="utf8")) or {}).get("base", {})
    return base.get("revision") if (base.get("source"), base.get("repo")) == ("hub", order.model) else None


def _require_unused(order: Order, kind: str, *options: str) -> None:
    """Refuse options that say nothing of a kind of model."""
    for option in options:
        if (value := getattr(order, option)) is not None:
            raise ConfigError(f"--{option}: found {value!r} for {order.model}, {kind}, wanted none: it has its own")


def _own(order: Order, path: Path) -> list[str]:
    """What a model on this disk does not say of itself."""
    if order.license is None:
        raise ConfigError(f"--license: not given, wanted the licence of {path}: the release and its card pass it on")
    whole = path.absolute()
    return [f"base.name={_quoted(order.name or (whole.name if path.is_dir() else whole.stem))}", f"base.license={_quoted(order.license)}"]


def _quoted(text: str) -> str:
    """As a value of an override."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# How it is run.


def _make_absolute(sections: Any) -> None:
    """Paths of files of one's own are relative to this project, as for `dvc exp run`, not to the directory of the run."""
    texts = [source for corpora in sections["text"].values() for source in corpora.values()]
    for section in (sections["base"], *texts):
        if section.get("path"):
            section["path"] = str(CONF.parent / Path(section["path"]).expanduser())


def _prepare(run: Path, sections: Any) -> None:
    """The directory of the run, with its params.yaml; that of an interrupted run keeps what it has."""
    params = run / PARAMS
    if params.is_file():
        print(f"going on in {run}")
    else:
        remove(run)
        run.mkdir(parents=True)
        for shared in (OWN_TASKS, FRONTIERS):
            (run / shared).symlink_to(CONF.parent / shared)
    params.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf8")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What runs a stage.

    outputs: paths that are removed before it runs. key: a hash of all that its result depends on.
    """

    stage: str
    description: str
    words: list[str]
    outputs: tuple[str, ...]
    key: str


def _commands(sections: Any) -> Iterator[Command]:
    """Those of every stage up to the release, in order."""
    root = CONF.parent
    described = yaml.safe_load((root / DVC_YAML).read_text(encoding="utf8"))["stages"]
    stages = stages_of(TARGET, root / DVC_YAML)

    def read_besides(stage: Stage) -> list[Any]:
        code = [[path, sha256(file)] for path in stage.code for file in _files(root / path) if "__pycache__" not in file.parts]
        return [code, _state_of(sections["base"].get("path"))] if stage.name == FETCH else [code]

    made = keys(stages, sections, read_besides)
    for stage in stages:
        entry = described[stage.name]
        python, *arguments = shlex.split(entry["cmd"])
        yield Command(
            stage=stage.name,
            description=entry["desc"],
            words=[sys.executable if python == "python" else python, *arguments],
            outputs=stage.outputs,
            key=made[stage.name],
        )


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _state_of(path: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model on this disk; fetch_base takes none of its folders."""
    if path is None or not Path(path).is_dir():
        return []  # a GGUF file's hash is one of the choices
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _run(run: Path, command: Command, title: str) -> None:
    ended = read_json(run / ENDED) if (run / ENDED).is_file() else {}
    if ended.get(command.stage) == command.key:
        print(f"{title} (done before)", flush=True)
        return
    print(title, flush=True)
    stopwatch = Stopwatch()
    if ended.pop(command.stage, None) is not None:  # with other choices
        write_json(run / ENDED, ended)
        for output in command.outputs:
            remove(run / output)
    path = os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(command.words, cwd=run, env={**os.environ, "PYTHONPATH": path})
    if process.returncode:
        stage = command.stage
        raise SparsesweepError(f"{stage} failed, and nothing is at the place of the release; the same command goes on from here, in {run}")
    write_json(run / ENDED, {**ended, command.stage: command.key})
    print(f"    {stopwatch.seconds:.0f} s", flush=True)


def _summary(run: Path) -> str:
    """Sparsity, perplexities with standard errors, and what pruning took."""
    pruned = read_json(run / PRUNE_RESULTS / "metrics.json")
    dense, sparse = (read_json(run / directory / "metrics.json") for directory in (DENSE_RESULTS, SPARSE_RESULTS))
    rows = [["sparsity", f"{pruned['sparsity']:.4f}"]]
    for corpus, scores in sparse["corpora"].items():
        for label, metrics in (("dense", dense["corpora"][corpus]), ("sparse", scores)):
            rows.append([f"perplexity on {corpus}, {label}", _shown(metrics, "perplexity", 2)])
    for label, metrics in (("dense", dense), ("sparse", sparse)):
        mean = metrics.get("mean", {}).get("tasks", {})
        if "accuracy" in mean:
            rows.append([f"mean accuracy, {label}", _shown(mean, "accuracy", 3)])
    rows.append(["pruning", f"{pruned['seconds']:.0f} s, peak memory {pruned['peak_memory_gib']:.2f} GiB"])
    return "\n" + tabulate(rows, tablefmt="plain", disable_numparse=True)


def _shown(metrics: dict[str, float], name: str, digits: int) -> str:
    """A value with its standard error, where that is known."""
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
