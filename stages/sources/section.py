"""The form in which provenance files record a source's section."""

from dataclasses import asdict
from typing import Any


def recorded(section: Any) -> dict[str, Any]:
    """The section as plain data; a path on this machine is private and recorded as null."""
    return {key: None if key == "path" else value for key, value in asdict(section).items()}
