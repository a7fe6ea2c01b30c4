"""May the pruned model be published at all? The base's licence says so; and how the hub names that licence.

Names: docs/hub/repositories-licenses.md of huggingface/hub-docs, commit 242f4a1; license_link: modelcard.md there.
"""

import re
from typing import Any

from stages.errors import ReleaseError
from stages.release.names import is_repository

UNKNOWN = ("", "other", "unknown", "none", "no license", "no licence", "unlicensed", "proprietary", "all rights reserved")
NAMES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0
    bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
    odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
"""
OF_THE_HUB = frozenset(NAMES.split())
LINKED = ("LICENSE", "LICENSE.md")  # names of files of the repository itself that license_link may be; else it is a URL
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


def named_for_hub(license_name: str, documents: list[str], release: str) -> dict[str, Any]:
    """What the card's metadata say of a licence.

    Args:
        license_name: as the base states it. documents: files of the release that state its terms. release: name of the release.

    Returns:
        `license`; where the hub does not list it, also `license_name` and, if a document can be linked, `license_link`.
    """
    listed = license_name.strip().lower()
    if listed in OF_THE_HUB:
        return {"license": listed}
    named = {"license": "other", "license_name": license_name}
    for document in sorted(documents, key=_states_terms, reverse=True)[:1]:
        if document in LINKED:
            named["license_link"] = document
        elif is_repository(release):
            named["license_link"] = f"https://huggingface.co/{release}/blob/main/{document}"
    return named


def _states_terms(document: str) -> tuple[bool, bool]:
    """Licences before terms, and both before notices and policies."""
    return document.startswith("LICENSE"), "TERMS" in document
