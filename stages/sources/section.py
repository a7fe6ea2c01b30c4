"""The form in which provenance files record a source's section."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any


def recorded(section: Any, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The section as plain data, with the commit that its revision was: who repeats it gets the same, even if a branch has moved since.
    A path on this machine is private and recorded as null.

    Args:
        origin: where it was fetched from; its "revision", if it has one, is that commit.
    """
    pinned = {"path": None, "revision": origin.get("revision")}
    return {key: pinned.get(key, value) for key, value in asdict(section).items()}
