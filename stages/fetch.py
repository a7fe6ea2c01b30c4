"""Fetch the base checkpoint, or the text that calibration and evaluation read.

python -m stages.fetch part=base|text

Each part imports only its own module, so that after an edit of a reader the base is not fetched again.
"""

import logging
from typing import Any

from stages.config.entry import stage
from stages.files import BASE, TEXT, replacing

log = logging.getLogger(__name__)


@stage(parts={"base": ("base",), "text": ("text",)})
def main(part: str, base: Any = None, text: Any = None) -> None:
    if part == "base":
        fetch_base(base)
    else:
        fetch_text(text)


def fetch_base(base: Any) -> None:
    """Write artifacts/base.

    Args:
        base: the section, one of the dataclasses in stages/sources/base.py.
    """
    from stages.sources.base import fetch

    with replacing(BASE) as directory:
        provenance = fetch(base, directory, downloads=BASE.with_name("base-downloads"))
    log.info("wrote %s: %s, fingerprint %s", BASE, provenance["name"], provenance["fingerprint"][:12])


def fetch_text(text: Any) -> None:
    """Write artifacts/text.

    Args:
        text: the section, the dataclass Text in stages/sources/text.py.
    """
    from stages.sources.text import fetch

    with replacing(TEXT) as directory:
        provenance = fetch(text, directory, downloads=TEXT.with_name("text-downloads"))
    log.info("wrote %s: %d files", TEXT, len(provenance["files"]))


if __name__ == "__main__":
    main()
