"""The release's params.yaml: plain data, with which `dvc repro` makes the release again."""

from pathlib import Path
from typing import Any

import yaml

from stages.errors import ReleaseError

HEAD = "# As params.yaml of sparsesweep, `dvc repro` makes this release again.\n"


def write_params(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    """Write the sections.

    Raises:
        ReleaseError: a value is no plain data, would be read as an interpolation, or is a path of this machine; names the key.
    """
    for key, source in _local_sources(sections).items():
        if source["path"] is not None:
            raise ReleaseError(f"{key}.path: found a path of this machine, wanted null; run the fetch stage again")
    for name, section in sections.items():
        _require_plain(name, section)
    path.write_text(HEAD + yaml.safe_dump(sections, sort_keys=False), encoding="utf8")


def _require_plain(key: str, value: object) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _require_plain(key, name)
            _require_plain(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _require_plain(key, inner)
    elif isinstance(value, str):
        if "${" in value:
            raise ReleaseError(f"{key}: found '${{' in its text, wanted plain text: whoever replays the release would have it interpolated")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ReleaseError(f"{key}: found a {type(value).__name__}, wanted null, a truth value, a number or text")


def local_paths(sections: dict[str, dict[str, Any]]) -> list[str]:
    """Keys of files and directories that lay on the disk of whoever made the release: who replays it sets them anew."""
    return [f"{key}.path" for key in _local_sources(sections)]


def _local_sources(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    sources = {"base": sections["base"]}
    for split, corpora in sections["text"].items():
        sources |= {f"text.{split}.{name}": source for name, source in corpora.items()}
    return {key: source for key, source in sources.items() if "path" in source}
