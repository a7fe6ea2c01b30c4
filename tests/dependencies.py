"""Which files under stages/ a stage of dvc.yaml runs, by the syntax trees of its modules.

A module runs what it imports, wherever the import stands, with one exception: what is imported inside a function of a stage's own
module whose name ends in _PART (evaluate_sparse) belongs to that part alone. What is imported by name (importlib) checks the sections of
other stages and shapes no result.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from tests.project import ROOT

COMMANDS = [stage["cmd"] for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()]


def code_of(command: str) -> set[Path]:
    """The files of a stage's command, `python -m stages.NAME [part=PART]`."""
    module, part = _split(command)
    others = {other for name, other in map(_split, COMMANDS) if name == module and other is not None} - {part}
    found = closure(ROOT / (module.replace(".", "/") + ".py"), others)
    packages = {parent / "__init__.py" for file in found for parent in file.parents if parent.is_relative_to(ROOT / "stages")}
    return found | {init for init in packages if init.is_file()}


def closure(main: Path, others: Iterable[str] = ()) -> set[Path]:
    """A file and all under stages/ that it imports, and so on; without what its functions for other parts import."""
    found, todo = {main}, _files(_imports(ast.parse(main.read_text()), others))
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo |= _files(_imports(ast.parse(file.read_text()), ()))
    return found


def _split(command: str) -> tuple[str, str | None]:
    module, *arguments = command.split("-m ")[1].split()
    return module, arguments[0].removeprefix("part=") if arguments else None


def _imports(node: ast.AST, others: Iterable[str]) -> Iterator[str]:
    """Names of modules, and of what is taken from them, which may be modules too; without those of functions of other parts."""
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif (
        isinstance(node, ast.FunctionDef)
        and node.name.rpartition("_")[2] in others
        or isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ):
        return
    else:
        for inner in ast.iter_child_nodes(node):
            yield from _imports(inner, others)


def _files(names: Iterable[str]) -> set[Path]:
    """Those of the modules that lie under stages/; of a package that is a table of its modules, all of them."""
    found = set()
    for name in {name for name in names if name.split(".")[0] == "stages"}:
        path = ROOT / name.replace(".", "/")
        if path.with_suffix(".py").is_file():
            found.add(path.with_suffix(".py"))
        elif (path / "__init__.py").is_file():
            found.add(path / "__init__.py")
            if "Table.collected" in (path / "__init__.py").read_text():
                found |= set(path.glob("*.py"))
    return found
