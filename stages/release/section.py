"""The section `publish`."""

from dataclasses import dataclass

from stages.release.names import LEGAL, is_legal, is_repository
from stages.schema import checked


@dataclass(kw_only=True, slots=True)
class Hub:
    """Where the release is sent; see release.uploading.

    repo: ORG/NAME; null: nowhere. private: whether only its members see it. existing: whether a repository that was not created from
    here may be taken, whose files the release then replaces. dry_run: say what would be sent, and send nothing.
    """

    repo: str | None = checked(is_repository, f"ORG/NAME, each {LEGAL}")
    private: bool
    existing: bool
    dry_run: bool


@dataclass(kw_only=True, slots=True)
class Publish:
    """name: of the release; null: made of the base, the recipe's label and the pattern, see naming.default_name.

    any_license: whether a base is published whose licence forbids changed copies, or is not known; for use of one's own.
    """

    name: str | None = checked(is_legal, LEGAL)
    any_license: bool
    hub: Hub
