"""The JSON files by which a release says what it is: read as values of a type, of one format."""

from pathlib import Path
from typing import Any

from stages.errors import ReleaseError
from stages.files import read_json
from stages.plain_data import of_type


def read_manifest_of(kind: Any, path: Path, *, wanted_format: str, otherwise: str) -> Any:
    """Read a file of a release.

    Args:
        kind: of the value that is returned, see plain_data.of_type; its key "format" must be `wanted_format`.
        otherwise: what was wanted of the directory, for the error where the file is not there.

    Raises:
        ReleaseError: there is no such file, or one of another format or form.
    """
    if not path.is_file():
        raise ReleaseError(f"{path.parent}: found no {path.name}, wanted {otherwise}")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != wanted_format:
        raise ReleaseError(f"{path}: found the format {data.get('format') if isinstance(data, dict) else data!r}, wanted {wanted_format!r}")
    try:
        return of_type(kind, data, path.name)
    except ValueError as error:
        raise ReleaseError(f"{path}: {error}") from error
