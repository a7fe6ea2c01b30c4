"""The sections of params.yaml, and the module that defines the shape of each, in the package that reads it.

Every stage checks every section, so that a bad value stops the first stage that runs; but the code of a section that only is
checked shapes no result. It is therefore imported here by name, and is no dependency of the other stages.
"""

import copy
import importlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stages.config.environment import installed
from stages.config.params import refuse_interpolations
from stages.errors import ConfigError
from stages.schema import CHOICES, TABLE, Table, check, require, require_one_of

SECTIONS = {
    "environment": "stages.config.environment:Environment",
    "text": "stages.sources.text:Text",
    "base": "stages.sources.base:BASES",
    "calibration": "stages.calibration.section:Calibration",
    "method": "stages.pruning.method:Method",
    "pattern": "stages.pruning.patterns:PATTERNS",
    "allocation": "stages.pruning.allocations:ALLOCATIONS",
    "reconstruction": "stages.pruning.reconstructions:RECONSTRUCTIONS",
    "prune": "stages.pruning.section:Prune",
    "evaluation": "stages.evaluation.section:Evaluation",
    "ruler": "stages.evaluation.section:Ruler",
    "publish": "stages.release.section:Publish",
}

Shape = Table[Any] | type
MOST_READ = 256  # sections that are kept
_READ: dict[tuple[str, str], Any] = {}  # a section's name and what it has -> the section, which must not be changed


@cache
def shape(section: str) -> Shape:
    """The dataclass of a section, or the table of those that it may be."""
    module, _, name = SECTIONS[section].partition(":")
    return getattr(importlib.import_module(module), name)


def typed(key: str, node: Any, shape: Shape) -> Any:
    """A section as its dataclass, not yet checked.

    Args:
        key: its name in the configuration. node: what the configuration has there.

    Raises:
        ConfigError: on an unknown choice, an unknown or missing key, or a wrong type; names the key.
    """
    require(isinstance(node, DictConfig), key, node, "a section of keys")
    if isinstance(shape, Table):
        require_one_of(f"{key}.{shape.key}", node.get(shape.key), list(shape))
    dataclass = shape[node[shape.key]].parameters if isinstance(shape, Table) else shape
    try:
        section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(dataclass), node))
    except OmegaConfBaseException as error:
        keys, group = ", ".join(field.name for field in fields(dataclass)), key.split(".")[0]
        advice = f"; wanted {keys}, as the files of conf/{group} have them" if isinstance(error, MissingMandatoryValue) else ""
        raise ConfigError(f"{key}: {str(error).splitlines()[0]} (key {error.full_key or '?'}){advice}") from None
    for field in fields(dataclass):
        if TABLE in field.metadata:
            setattr(section, field.name, typed(f"{key}.{field.name}", node[field.name], field.metadata[TABLE]))
        elif CHOICES in field.metadata:
            require(isinstance(node[field.name], DictConfig), f"{key}.{field.name}", node[field.name], "sections by name")
            inner = {
                str(name): typed(f"{key}.{field.name}.{name}", value, field.metadata[CHOICES]) for name, value in node[field.name].items()
            }
            setattr(section, field.name, inner)
    return section


def read(cfg: DictConfig) -> dict[str, Any]:
    """All sections as dataclasses, checked alone and together.

    Raises:
        ConfigError: naming the key, the value found and the value wanted.
    """
    missing = [name for name in SECTIONS if name not in cfg]
    require(not missing, "params.yaml", f"no section {', '.join(missing)}", "all sections of conf/config.yaml")
    unknown = sorted(set(map(str, cfg)) - set(SECTIONS) - {"part"})
    require(not unknown, "params.yaml", f"sections {unknown}", f"only {', '.join(SECTIONS)}")
    sections = {name: _section(name, cfg[name]) for name in SECTIONS}
    importlib.import_module("stages.config.checks").check_together(sections)
    return sections


def _section(name: str, node: Any) -> Any:
    """A section as its dataclass, checked alone, see read; what was read before in this process is not read again."""
    try:
        found = name, repr(OmegaConf.to_container(node, resolve=True))
    except (OmegaConfBaseException, ValueError):  # ValueError: it is no node
        return _checked(name, node)  # which refuses both
    if found not in _READ:
        if len(_READ) >= MOST_READ:
            _READ.clear()
        _READ[found] = _checked(name, node)
    return copy.deepcopy(_READ[found])


def _checked(name: str, node: Any) -> Any:
    section = typed(name, node, shape(name))
    check(section, name)
    return section


def register(names: Collection[str] = tuple(SECTIONS)) -> None:
    """Give Hydra's composition, and so DVC's, the shape of the groups of some sections, and the check of what is composed."""
    store = ConfigStore.instance()
    for group, option, dataclass in (schema for name in names for schema in _schemas(name)):
        store.store(group=group, name=f"{option}_schema", node=dataclass)
    OmegaConf.register_new_resolver("version", _checked_version, replace=True)


def _schemas(name: str) -> Iterator[tuple[str, str, type]]:
    """Group, option and dataclass of a section, and of sections within it, whose shape Hydra can hold."""
    table = shape(name)
    dataclasses = {option: entry.parameters for option, entry in table.items()} if isinstance(table, Table) else {name: table}
    for option, dataclass in dataclasses.items():
        if not any(CHOICES in field.metadata for field in fields(dataclass)):
            yield name, option, dataclass
        for field in fields(dataclass):
            for inner, entry in field.metadata.get(TABLE, {}).items():
                yield f"{name}/{field.name}", inner, entry.parameters


def _checked_version(library: str, *, _root_: DictConfig) -> str:
    """The resolver ${version:LIBRARY} of conf/environment: the version installed.

    It is the only code of ours that runs when DVC composes an experiment; so it checks the whole composition, and a bad value is
    refused before anything is queued.

    Raises:
        ConfigError: see read.
    """
    plain = OmegaConf.to_container(_root_, resolve=False)
    if isinstance(plain, dict) and set(SECTIONS) <= set(plain):
        sections = _with_versions({name: plain[name] for name in SECTIONS})
        refuse_interpolations(sections, "conf")
        _check_composition(json.dumps(sections))
    return installed(library)


@lru_cache(maxsize=1)
def _check_composition(sections: str) -> None:
    """Check a composition, as JSON, once for all the versions that it asks for; see read."""
    read(OmegaConf.create(json.loads(sections)))


def _with_versions(value: Any) -> Any:
    """The same with every ${version:LIBRARY} replaced."""
    if isinstance(value, dict):
        return {key: _with_versions(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_versions(inner) for inner in value]
    return re.sub(r"\$\{version:(\w+)\}", lambda match: installed(match[1]), value) if isinstance(value, str) else value
