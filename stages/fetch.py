"""Fetch the base checkpoint, or the text that calibration and evaluation read.

python -m stages.fetch part=base|text
"""

import logging

from stages.config import Base, Text, stage
from stages.files import BASE, TEXT, replacing
from stages.sources import base as checkpoints
from stages.sources import text as corpora

log = logging.getLogger(__name__)


@stage(parts={"base": ("base",), "text": ("text",)})
def main(part: str, base: Base | None = None, text: Text | None = None) -> None:
    if base is not None:
        with replacing(BASE) as directory:
            provenance = checkpoints.fetch(base, directory, downloads=BASE.with_name("base-downloads"))
        log.info("wrote %s: %s, fingerprint %s", BASE, provenance["name"], provenance["fingerprint"][:12])
    if text is not None:
        with replacing(TEXT) as directory:
            provenance = corpora.fetch(text, directory, downloads=TEXT.with_name("text-downloads"))
        log.info("wrote %s: %d files", TEXT, len(provenance))


if __name__ == "__main__":
    main()
