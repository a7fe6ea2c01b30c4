"""Send the release to a model hub, if publish.hub names a repository there; record the commit that has it.

python -m stages.upload publish.hub.repo=ORG/NAME publish.hub.dry_run=true
"""

import logging
from typing import TYPE_CHECKING

from stages.config.entry import Idle, stage
from stages.files import RELEASE, UPLOAD, remove, write_json
from stages.release.sent import Sent

if TYPE_CHECKING:
    from stages.release.section import Hub

log = logging.getLogger(__name__)


def record(sent: Sent) -> None:
    remove(UPLOAD)  # it may be a link into the cache
    UPLOAD.parent.mkdir(parents=True, exist_ok=True)
    write_json(UPLOAD, sent.as_dict())
    log.info("%s", sent)


def record_nothing() -> None:
    record(Sent(repo=None))


@stage("publish.hub", idle=Idle("publish.hub.repo", None, record_nothing, frozenset({"private", "existing", "dry_run"})))
def main(publish_hub: "Hub") -> None:
    if publish_hub.repo is None:
        record_nothing()
        return
    from stages.release.uploading import send

    record(send(RELEASE, publish_hub))


if __name__ == "__main__":
    main()
