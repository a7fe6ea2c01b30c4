"""A source's section as provenance files record it."""

from dataclasses import asdict
from typing import Any


def recorded(section: Any) -> dict[str, Any]:
    """The section as plain data; a path on this machine is private, and null."""
    return {key: None if key == "path" else value for key, value in asdict(section).items()}
