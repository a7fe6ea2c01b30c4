"""May the pruned model be published at all? The base's licence says so."""

import re

from stages.errors import ReleaseError

UNKNOWN = ("", "other", "unknown", "none", "no license", "no licence", "unlicensed", "proprietary", "all rights reserved")
NO_DERIVATIVES = re.compile(r"(^|[^a-z])nd([^a-z]|$)|no.?deriv", re.IGNORECASE)  # as in cc-by-nc-nd-4.0


def require_derivable(license_name: str, *, any_license: bool) -> None:
    """Refuse a base whose licence forbids changed copies, or is not known. Any other is inherited; whether its terms are met is yours.

    Args:
        license_name: as the base states it. any_license: take it anyway, for use of one's own.

    Raises:
        ReleaseError: names the licence.
    """
    if any_license:
        return
    advice = "set base.license to what applies, or publish.any_license=true for a release of your own use"
    if license_name.strip().lower() in UNKNOWN:
        raise ReleaseError(f"licence of the base: found {license_name!r}, wanted one that is known; {advice}")
    if NO_DERIVATIVES.search(license_name):
        raise ReleaseError(
            f"licence of the base: found {license_name!r}, which forbids changed copies, wanted one that allows them; {advice}"
        )
