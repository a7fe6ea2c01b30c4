"""Send the release to a model hub, if publish.hub names a repository there; record the commit that has it.

python -m stages.upload publish.hub.repo=ORG/NAME publish.hub.dry_run=true
"""

import logging

from stages.config.entry import stage
from stages.files import RELEASE, UPLOAD, remove, write_json
from stages.release.section import Hub
from stages.release.uploading import Sent, send

log = logging.getLogger(__name__)


@stage("publish.hub")
def main(publish_hub: Hub) -> None:
    sent = Sent(repo=None) if publish_hub.repo is None else send(RELEASE, publish_hub)
    remove(UPLOAD)  # it may be a link into the cache
    UPLOAD.parent.mkdir(parents=True, exist_ok=True)
    write_json(UPLOAD, sent.as_dict())
    log.info("%s", sent)


if __name__ == "__main__":
    main()
