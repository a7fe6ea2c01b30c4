"""Generated text between two marker lines of a document."""

from pathlib import Path


def write_between(document: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: a marker is not there exactly once, in this order; names it and the document.
    """
    content = document.read_text(encoding="utf8")
    for marker in (start, end):
        if content.count(marker) != 1:
            raise ValueError(f"{document}: found {content.count(marker)} times {marker}, wanted once")
    before, rest = content.split(start)
    if end not in rest:
        raise ValueError(f"{document}: found {end} before {start}, wanted it after")
    document.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf8")


def show_between(document: Path, start: str, end: str, text: str) -> None:
    """Print a text, and replace what stands between the markers; see write_between."""
    print(text)
    write_between(document, start, end, text)
