"""Fetch the base checkpoint, or the text that calibration and evaluation read.

python -m stages.fetch part=base|text

Each part imports its own module, so that an edit of a reader does not fetch the base again.
"""

import logging
from typing import Any

from stages.config.entry import stage
from stages.files import BASE, TEXT, replacing

log = logging.getLogger(__name__)


@stage(parts={"base": ("base",), "text": ("text", "environment.datasets")})
def main(part: str, base: Any = None, text: Any = None) -> None:
    if part == "base":
        fetch_base(base)
    else:
        fetch_text(text)


def fetch_base(base: Any) -> None:
    """Write artifacts/base.

    Args:
        base: a section of one of the dataclasses in stages/sources/base.py.
    """
    from stages.sources.base import fetch

    with replacing(BASE) as directory:
        provenance = fetch(base, directory, downloads=BASE.with_name("base-downloads"))
    log.info("wrote %s: %s, fingerprint %s", BASE, provenance["name"], provenance["fingerprint"][:12])


def fetch_text(text: Any) -> None:
    """Write artifacts/text.

    Args:
        text: a section of the dataclass Text in stages/sources/text.py.
    """
    from stages.sources.text import fetch

    with replacing(TEXT) as directory:
        provenance = fetch(text, directory, downloads=TEXT.with_name("text-downloads"))
    log.info("wrote %s: %d files", TEXT, len(provenance["files"]))


if __name__ == "__main__":
    main()
