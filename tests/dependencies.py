"""Which files under stages/ a stage of dvc.yaml runs, by the syntax trees of its modules.

A module's code is what it imports, wherever the import stands, with one exception: an import inside `if part == "NAME":` of a stage's
own module belongs to that part alone. What is imported by name (importlib) checks the sections of other stages and shapes no result.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.project import ROOT


def code_of(command: str) -> set[Path]:
    """The files of a stage's command, `python -m stages.NAME [part=PART]`."""
    module, *arguments = command.split("-m ")[1].split()
    part = arguments[0].removeprefix("part=") if arguments else None
    main = ROOT / (module.replace(".", "/") + ".py")
    found, todo = {main}, files_of(_imports(ast.parse(main.read_text()), part))
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo |= files_of(_imports(ast.parse(file.read_text()), None))
    return found | packages_of(found)


def _imports(node: ast.AST, part: str | None) -> Iterator[str]:
    """Names of modules, and of what is taken from them, which may be modules too."""
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.If) and (name := _part_of(node.test)) is not None:
        for inner in node.body if name == part else node.orelse:
            yield from _imports(inner, part)
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    else:
        for inner in ast.iter_child_nodes(node):
            yield from _imports(inner, part)


def _part_of(test: ast.expr) -> str | None:
    """NAME where a condition reads `part == "NAME"`."""
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "part" and isinstance(test.ops[0], ast.Eq):
        (right,) = test.comparators
        return right.value if isinstance(right, ast.Constant) else None
    return None


def files_of(names: Iterator[str]) -> set[Path]:
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


def packages_of(files: set[Path]) -> set[Path]:
    """The __init__.py of every package that the files lie in, where there is one."""
    inits = {parent / "__init__.py" for file in files for parent in file.parents if parent.is_relative_to(ROOT / "stages")}
    return {init for init in inits if init.is_file()}
