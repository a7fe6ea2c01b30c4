"""Sections of the configuration: types, units and ranges of their keys, and tables of named choices.

A dataclass states the keys of a section and their types; a field states the range of a key:

    @dataclass(kw_only=True, slots=True)
    class Admm:
        name: str
        steps: int = number(minimum=1)
        penalty: float = number(above=0)

Values are in conf/ only: no field has a default. A table holds the choices for a section whose keys depend on the value of one of
them, such as the scores. One entry is one choice, and states everything that other code derives from it.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from stages.errors import ConfigError

CHECK, TABLE, CHOICES = "check", "table", "choices"  # keys of a field's metadata


def require(valid: bool, key: str, value: object, wanted: str) -> None:
    """Raise ConfigError naming the key, the value found and the value wanted, unless `valid`."""
    if not valid:
        raise ConfigError(f"{key}: found {value!r}, wanted {wanted}")


def require_one_of(key: str, value: object, allowed: Collection[str]) -> None:
    """Raise ConfigError naming the key, the value found and all allowed values, unless the value is one of them."""
    require(isinstance(value, str) and value in allowed, key, value, "one of " + ", ".join(allowed))


# Fields: the values that one key may have.


@dataclass(frozen=True, kw_only=True)
class Check:
    """A condition on a value.

    accepts: whether a value meets it. wanted: its description, for the error.
    required: whether null, if the type allows it, stands for a value that the user has still to give.
    """

    accepts: Callable[[Any], bool]
    wanted: str
    required: bool = False


def checked(accepts: Callable[[Any], bool], wanted: str, *, required: bool = False) -> Any:
    """A field whose value must meet a condition, see Check."""
    return field(metadata={CHECK: Check(accepts=accepts, wanted=wanted, required=required)})


def number(
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> Any:
    """A field for a number in a range.

    Args:
        minimum, maximum: inclusive bounds. above, below: exclusive bounds. One lower bound is required.
        unit: unit in the error, such as "tokens".
    """
    low, high = above if minimum is None else minimum, below if maximum is None else maximum
    left = "(" if minimum is None else "["
    right = ")" if maximum is None else "]"

    def accepts(value: float) -> bool:
        if not math.isfinite(value):
            return False
        above_low = low is None or (value > low if minimum is None else value >= low)
        return above_low and (high is None or (value < high if maximum is None else value <= high))

    if high is not None:
        wanted = f"a number in {left}{low:g}, {high:g}{right}"
    elif minimum is None:
        wanted = f"more than {low:g}"
    else:
        wanted = "0 or more" if low == 0 else f"at least {low:g}"
    return checked(accepts, f"{wanted} {unit}".strip())


def one_of(*allowed: str) -> Any:
    """A field for one of several words."""
    return checked(lambda value: value in allowed, "one of " + ", ".join(allowed))


def text(wanted: str) -> Any:
    """A field for a string that is not empty; null is refused, too."""
    return checked(lambda value: isinstance(value, str) and bool(value), wanted, required=True)


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def sha256(of: str) -> Any:
    """A field for the SHA-256 of something."""
    return checked(is_sha256, f"the SHA-256 of {of}, 64 hexadecimal digits", required=True)


def check(section: Any, key: str) -> None:
    """Check a section and the sections in it: the range of each key, then the conditions on several keys in its own `check`.

    Args:
        section: a dataclass. key: its name in the configuration, such as "method.update".

    Raises:
        ConfigError: names the key, the value found and the value wanted.
    """
    for section_field in fields(section):
        value, path = getattr(section, section_field.name), f"{key}.{section_field.name}"
        condition: Check | None = section_field.metadata.get(CHECK)
        if condition is not None:
            nullable = "None" in str(section_field.type) and not condition.required
            valid = nullable if value is None else condition.accepts(value)
            require(valid, path, value, f"null or {condition.wanted}" if nullable else condition.wanted)
        if section_field.type == list[str]:
            strings = isinstance(value, list) and all(isinstance(item, str) for item in value)  # OmegaConf lets lists of lists pass
            require(strings, path, value, "a list of words")
        for inner_path, inner in _values(value, path):
            if is_dataclass(inner):
                check(inner, inner_path)
    if hasattr(section, "check"):
        section.check(key)


def _values(value: Any, path: str) -> list[tuple[str, Any]]:
    """The values of a mapping or a list, or the value itself, each with its path."""
    if isinstance(value, dict):
        return [(f"{path}.{name}", inner) for name, inner in value.items()]
    if isinstance(value, list):
        return [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
    return [(path, value)]


# Tables: named choices.


@dataclass(frozen=True, kw_only=True)
class Citation:
    """A publication: its short name, such as "Sun et al. 2024", and its URL."""

    text: str
    url: str

    @property
    def markdown(self) -> str:
        return f"[{self.text}]({self.url})"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One choice.

    name: its name in YAML and on the command line.
    parameters: the dataclass of its section.
    summary: one line for tables, model cards and lists of options, without a full stop.
    citation: its publication; None for our own methods and for common knowledge.
    """

    name: str
    parameters: type
    summary: str
    citation: Citation | None = None

    @property
    def reference(self) -> str:
        """The summary with its source, in Markdown."""
        return self.summary if self.citation is None else f"{self.summary} ({self.citation.markdown})"


E = TypeVar("E", bound=Entry)


class Table(Mapping[str, E], Generic[E]):
    """The choices for one concept, by name.

    Args:
        key: the key of the section whose value names the choice.
        entries: the choices, in the order in which lists show them.
    """

    def __init__(self, entries: Collection[E], key: str = "name") -> None:
        self.key = key
        self._entries: dict[str, E] = {}
        for entry in entries:
            self.add(entry)

    @classmethod
    def collected(cls, package: ModuleType, kind: type[E], key: str = "name") -> "Table[E]":
        """Make a table of all entries of a class that the modules of a package have at their top level, modules sorted by name.

        Raises:
            ValueError: two entries have the same name.
        """
        table = cls([], key)
        for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")):
            for value in vars(importlib.import_module(module)).values():
                if isinstance(value, kind) and table.get(value.name) is not value:  # a module may import another's entry
                    table.add(value)
        return table

    def add(self, entry: E) -> None:
        """Add an entry; raises ValueError if another entry has its name."""
        if entry.name in self._entries:
            raise ValueError(f"found two entries named {entry.name!r}, wanted one")
        self._entries[entry.name] = entry

    def of(self, section: Any) -> E:
        """The entry that a section names."""
        return self._entries[getattr(section, self.key)]

    def section(self, data: Mapping[str, Any], where: str) -> Any:
        """A section from plain data, as `dataclasses.asdict` gave it.

        Args:
            where: the data is from, for the error.

        Raises:
            ConfigError: the choice is unknown, or its keys are others.
        """
        require_one_of(f"{where}.{self.key}", data.get(self.key), list(self))
        parameters = self[data[self.key]].parameters
        names = [parameter.name for parameter in fields(parameters)]
        require(set(data) == set(names), where, sorted(data), f"the keys {', '.join(names)}")
        return parameters(**data)

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def choice(table: Table[Any]) -> Any:
    """A field for a section with the keys of an entry of the table."""
    return field(metadata={TABLE: table})


def choices(table: Table[Any] | type) -> Any:
    """A field for a mapping of names to sections, each with the keys of an entry of the table, or of the dataclass."""
    return field(metadata={CHOICES: table})
