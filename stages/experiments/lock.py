"""The dvc.lock of an experiment, and which of its outputs are of another run.

An experiment that ran some stages keeps the entries of the others as they were in the workspace: `dvc exp run prune` leaves the scores of
the run before, `dvc exp run evaluate_sparse` its release.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from dvc_data.hashfile.tree import Tree

from stages.experiments.command_output import output
from stages.files import parsed_json

LOCK = "dvc.lock"
OUTPUTS = Path("files/md5")  # in the cache: outputs by MD5, the first two digits a directory
PARAMS = "params.yaml"

PLAIN = (  # what is no string, by YAML 1.2: DVC writes 1e-05 for a number, and 2:4 and off for strings, which YAML 1.1 reads otherwise
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
)


class Loader(yaml.CSafeLoader):
    """YAML as DVC reads it, fifty times as fast."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for tag, pattern, first in PLAIN:
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), ["" if char == "\0" else char for char in first]
    )


@cache
def read_yaml(commit: str, path: str) -> Any:
    """A YAML file of a commit, which is parsed once and must not be changed.

    Args:
        commit: 40 hex digits.

    Raises:
        SparsesweepError: the commit does not have it.
    """
    return yaml.load(output("git", "show", f"{commit}:{path}"), Loader=Loader)


def read_lock(commit: str) -> dict[str, Any]:
    """The stages that the lock of a commit names: name -> "outs", "deps" and "params", as DVC writes them.

    Raises:
        SparsesweepError: the commit has no lock.
    """
    stages: dict[str, Any] = read_yaml(commit, LOCK).get("stages", {})
    return stages


PUBLISH = "publish"  # the stage that writes a release


def no_release(stages: dict[str, Any], params: dict[str, Any]) -> str | None:
    """Why an experiment has no release of its own, in words; None if it has one. Args: see other_run."""
    return other_run(stages, params, PUBLISH) if PUBLISH in stages else "it was not published"


def other_run(stages: dict[str, Any], params: dict[str, Any], stage: str, cache: Path | None = None) -> str | None:
    """Why the outputs of a stage are not those of an experiment, in words; None if they are.

    Args:
        stages: see `read_lock`. params: the sections of its params.yaml. stage: must be in the lock.
        cache: DVC's, which says what is in a directory of which the stage reads a part; None: such parts are not looked at.
    """
    return next(_differences(stages, params, stage, cache), None)


def _differences(stages: dict[str, Any], params: dict[str, Any], stage: str, cache: Path | None) -> Iterator[str]:
    """What a stage, and those before it, read that is not what the experiment has."""
    writers = {entry["path"]: (name, entry["md5"]) for name, of in stages.items() for entry in of.get("outs", [])}
    for key, value in stages[stage].get("params", {}).get(PARAMS, {}).items():
        if (wanted := value_at(params, key)) != value:
            yield f"{stage} read {key}={value}, and the experiment has {wanted}"
    before = set()
    for dependency in stages[stage].get("deps", []):
        path = Path(dependency["path"])
        output = next((str(above) for above in (path, *path.parents) if str(above) in writers), None)
        if output is None:
            continue
        writer, written = writers[output]
        before.add(writer)
        if written is not None and output != dependency["path"]:
            written = None if cache is None else part_of_directory(cache, written, path.relative_to(output))
        if written is not None and written != dependency["md5"]:
            yield f"{stage} read another {dependency['path']} than {writer} wrote"
    for writer in before:
        yield from _differences(stages, params, writer, cache)


def object_of(cache: Path, digest: str) -> Path:
    """Where a cache has what this is the MD5 of."""
    return cache / OUTPUTS / digest[:2] / digest[2:]


def part_of_directory(cache: Path, digest: str, path: Path) -> str | None:
    """The MD5 that DVC gives a file or directory inside an output; None where the cache lacks the list of the output's files.

    Args:
        digest: of the output. path: from the output on.
    """
    listed = object_of(cache, digest)
    if not listed.is_file():
        return None
    try:
        files = {entry["relpath"]: entry["md5"] for entry in parsed_json(listed.read_text(encoding="utf8"))}
        return files.get(path.as_posix()) or md5_of_directory(files, path)
    except (ValueError, KeyError, TypeError):  # it was cut short
        return None


def md5_of_directory(files: dict[str, str], path: Path) -> str:
    """The MD5 that DVC gives a directory of files. Args: files: path -> MD5 [hex]. path: of the directory among them."""
    inner = {Path(name): digest for name, digest in files.items() if Path(name).is_relative_to(path)}
    listed = [{"relpath": name.relative_to(path).as_posix(), "md5": digest} for name, digest in inner.items()]
    tree = Tree.from_list(listed, hash_name="md5")
    tree.digest()
    return str(tree.hash_info.value)


def value_at(params: dict[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    value: Any = params
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
