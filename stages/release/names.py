"""What a hub allows as the name of a repository."""

import re

LONGEST = 96  # characters of a repository's name on the hub
LEGAL = "a name of letters, digits, -, _ and ., at most 96, without -- and .., - or . at an end, and .git"


def is_legal(name: object) -> bool:
    """Whether the hub takes it as a repository's name, with or without ORG/ before it."""
    if not isinstance(name, str) or name.count("/") > 1:
        return False
    return all(_is_legal_segment(segment) for segment in name.split("/")) and not name.endswith(".git")


def is_repository(name: object) -> bool:
    """Whether it is the name of a repository, with ORG/ before it."""
    return is_legal(name) and str(name).count("/") == 1


def _is_legal_segment(segment: str) -> bool:
    return re.fullmatch(r"(?![-.])(?!.*(--|\.\.))[A-Za-z0-9_.-]{1,96}(?<![-.])", segment) is not None
