"""What an upload did."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What an upload did.

    repo: ORG/NAME; None where nothing was asked for. commit: that has the release; None if nothing was sent. url: of the repository.
    files, size: of the release, how many and in bytes. sha256sums: SHA-256 of the release's SHA256SUMS.
    """

    repo: str | None
    commit: str | None = None
    url: str | None = None
    private: bool | None = None
    files: int = 0
    size: int = 0
    sha256sums: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.repo is None:
            return "nothing was uploaded: publish.hub.repo names no repository"
        counted = f"{self.files} files, {self.size / 1e6:.1f} MB"
        if self.commit is None:
            return f"dry run, nothing was sent: {counted} would go to {self.url}, {visibility(private=bool(self.private))}"
        return f"{self.url} has the release ({counted}, {visibility(private=bool(self.private))}) as commit {self.commit}"


def visibility(*, private: bool) -> str:
    return "private" if private else "public"
