"""What is declared twice says the same: dependencies in pyproject.toml, pins in constraints.txt, imports in the code."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stages.quantisation import ggml
from tests.project import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
NOT_IMPORTED = {"accelerate", "ruamel-yaml-clib"}  # what other libraries import
WITH_TORCH = {"triton"}  # which torch's builds for NVIDIA GPUs bring


def imported() -> set[str]:
    """Top-level modules that the product imports."""
    modules = set()
    for file in [*ROOT.glob("stages/**/*.py"), *ROOT.glob("hydra_plugins/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
    return modules - set(sys.stdlib_module_names) - {"stages", "hydra_plugins"}


def test_what_is_imported_is_declared_and_no_more():
    distributions = packages_distributions()
    used = {canonicalize_name(distributions[module][0]) for module in imported() - WITH_TORCH}
    assert used == DECLARED - NOT_IMPORTED


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_dependency_is_pinned_within_its_bounds(name):
    (line,) = [line for line in PROJECT["dependencies"] if canonicalize_name(Requirement(line).name) == name]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    (version,) = [version for pinned, version in pins.items() if canonicalize_name(pinned) == name]
    assert Requirement(line).specifier.contains(version)


def test_the_library_of_an_extra_is_pinned_within_its_bounds():
    (line,) = PROJECT["optional-dependencies"]["ruler"]
    pins = dict(pin.split("==") for pin in (ROOT / "constraints.txt").read_text().splitlines())
    assert Requirement(line).name == ggml.PACKAGE
    assert Requirement(line).specifier.contains(pins[ggml.PACKAGE])


OPTIONAL = [
    line
    for extra in ("llama-cpp", "float8", "mlflow", "wandb", "energy", "ray", "search", "s3", "ssh", "remotes")
    for line in PROJECT["optional-dependencies"][extra]
]


@pytest.mark.parametrize("line", [line for line in OPTIONAL if not line.startswith(PROJECT["name"])])
def test_the_library_of_an_optional_part_is_pinned_within_its_bounds(line):
    pins = {
        canonicalize_name(name): version for name, version in (pin.split("==") for pin in (ROOT / "constraints.txt").read_text().split())
    }
    assert Requirement(line).specifier.contains(pins[canonicalize_name(Requirement(line).name)])


def test_transformers_whose_private_parts_are_used_has_an_upper_bound():
    (line,) = [line for line in PROJECT["dependencies"] if line.startswith("transformers")]
    assert any(specifier.operator == "<" for specifier in Requirement(line).specifier)
