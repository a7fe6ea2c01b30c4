"""What a section of the configuration may hold: types, units and ranges of its keys, and tables of named choices.

A dataclass states the shape of a section; the field states the range of a key, and what is allowed instead of it:

    @dataclass(kw_only=True, slots=True)
    class Admm:
        name: str
        steps: int = number(minimum=1)
        penalty: float = number(above=0)

Values live in conf/ alone: no field has a default. A table holds the choices for a section whose shape depends on one of its
keys, such as the scores; one entry is one choice, and says all that others derive from it.
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


def require(good: bool, key: str, found: object, wanted: str) -> None:
    """Raise ConfigError naming the key, the value found and the value wanted, unless `good`."""
    if not good:
        raise ConfigError(f"{key}: found {found!r}, wanted {wanted}")


def require_one_of(key: str, found: object, known: Collection[str]) -> None:
    """Raise ConfigError naming the key, the value found and all that is known, unless it is one of them."""
    require(isinstance(found, str) and found in known, key, found, "one of " + ", ".join(known))


# Fields: what one key may hold.


@dataclass(frozen=True, kw_only=True)
class Check:
    """A condition on a value.

    wanted: what it asks for, in words. required: whether null, where the type allows it, stands for a value that is still to be given.
    """

    accepts: Callable[[Any], bool]
    wanted: str
    required: bool = False


def checked(accepts: Callable[[Any], bool], wanted: str, *, required: bool = False) -> Any:
    """A field whose value must pass a condition, see Check."""
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
        minimum, maximum: bounds that are allowed themselves. above, below: bounds that are not.
        unit: for the error, such as "tokens".
    """
    low, high = above if minimum is None else minimum, below if maximum is None else maximum
    left = "(" if minimum is None else "["
    right = ")" if maximum is None else "]"

    def accepts(value: float) -> bool:
        if not math.isfinite(value):
            return False
        enough = low is None or (value > low if minimum is None else value >= low)
        return enough and (high is None or (value < high if maximum is None else value <= high))

    if high is not None:
        wanted = f"a number in {left}{low:g}, {high:g}{right}"
    elif minimum is None:
        wanted = f"more than {low:g}"
    else:
        wanted = "0 or more" if low == 0 else f"at least {low:g}"
    return checked(accepts, f"{wanted} {unit}".strip())


def one_of(*known: str) -> Any:
    """A field for one of some words."""
    return checked(lambda value: value in known, "one of " + ", ".join(known))


def text(wanted: str) -> Any:
    """A field for a string that is not empty; null is refused, too."""
    return checked(lambda value: isinstance(value, str) and bool(value), wanted, required=True)


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def sha256(of: str) -> Any:
    """A field for the SHA-256 of something."""
    return checked(is_sha256, f"the SHA-256 of {of}, 64 hexadecimal digits", required=True)


def check(section: Any, key: str) -> None:
    """Check a section and all that is in it: the range of each key, then what its own `check` says of several together.

    Args:
        section: a dataclass. key: its name in the configuration, such as "method.update".

    Raises:
        ConfigError: naming the key, the value found and the value wanted.
    """
    for one in fields(section):
        value, path = getattr(section, one.name), f"{key}.{one.name}"
        condition: Check | None = one.metadata.get(CHECK)
        if condition is not None:
            nullable = "None" in str(one.type) and not condition.required
            good = nullable if value is None else condition.accepts(value)
            require(good, path, value, f"null or {condition.wanted}" if nullable else condition.wanted)
        if is_dataclass(value):
            check(value, path)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if is_dataclass(inner):
                    check(inner, f"{path}.{name}")
    if hasattr(section, "check"):
        section.check(key)


# Tables: what may be chosen.


@dataclass(frozen=True, kw_only=True)
class Citation:
    """A publication: "Sun et al. 2024" and its address."""

    text: str
    url: str

    @property
    def markdown(self) -> str:
        return f"[{self.text}]({self.url})"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One choice.

    name: in YAML and on the command line.
    parameters: the dataclass of its section.
    summary: one line for tables, cards and lists of options; no full stop.
    citation: where it was published; None for our own and for what everybody uses.
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
        key: of the section, whose value names the choice.
        entries: in the order in which lists show them.
    """

    def __init__(self, entries: Collection[E], key: str = "name") -> None:
        self.key = key
        self._entries: dict[str, E] = {}
        for entry in entries:
            self.add(entry)

    @classmethod
    def collected(cls, package: ModuleType, kind: type[E], key: str = "name") -> "Table[E]":
        """All entries of a kind that the modules of a package define at their top level, by name."""
        table = cls([], key)
        for module in sorted(one.name for one in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")):
            for value in vars(importlib.import_module(module)).values():
                if isinstance(value, kind) and value.name not in table:
                    table.add(value)
        return table

    def add(self, entry: E) -> None:
        """Raises ValueError where another entry has the name."""
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
    """A field for a section whose shape is that of an entry of the table."""
    return field(metadata={TABLE: table})


def choices(table: Table[Any]) -> Any:
    """A field for a mapping of names to sections, each of the shape of an entry of the table."""
    return field(metadata={CHOICES: table})
