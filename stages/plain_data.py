"""Plain data, as JSON has them, as the type that an annotation states."""

import math
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from stages.rows import shown

EXACT = (str, bool, int, NoneType)


def of_type(kind: Any, value: Any, where: str) -> Any:
    """Make a value of a type, with all that is in it.

    Args:
        kind: str, bool, int, float, None, an enumeration, a dataclass, a list or a mapping of str to such, a union of them, or Any.
        value: lists and mappings. where: the data are from, for the error.

    Raises:
        ValueError: a value is of another type, or a key is missing or unknown; names it.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or kind in EXACT and type(value) is kind:
        return value
    if kind is float and type(value) in (int, float) and is_finite(value):
        return float(value)
    if origin is list and isinstance(value, list):
        return [of_type(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: of_type(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is UnionType:
        return _of_one(inner, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str) and value in list(kind):
        return kind(value)
    if is_dataclass(kind) and isinstance(value, dict):
        return _of_dataclass(kind, value, where)
    raise ValueError(f"{where}: found {shown(value)}, wanted {getattr(kind, '__name__', kind)}")


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold, and neither infinite nor none."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def _of_one(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The value as the first of several types that it fits; of the last one the error, unless the value is null."""
    for kind in kinds[:-1] if value is not None else [NoneType] * (NoneType in kinds):
        try:
            return of_type(kind, value, where)
        except ValueError:
            continue
    return of_type(next((kind for kind in reversed(kinds) if kind is not NoneType), NoneType), value, where)


def _of_dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    if not required <= set(value) <= set(hints):
        keys = ", ".join(map(shown, value)) or "no keys"
        missing = ", ".join(sorted(required - set(value))) or "no more"
        raise ValueError(f"{where}: found {keys[:200]}, wanted the keys of a {kind.__name__}; missing: {missing}")
    return kind(**{name: of_type(hints[name], item, f"{where}.{name}") for name, item in value.items()})
