import pytest

from stages.errors import ReleaseError
from stages.release.licence import require_derivable


@pytest.mark.parametrize("name", ["apache-2.0", "mit", "gemma", "llama3.1", "cc-by-nc-4.0", "bsd-3-clause", "openrail", "land-grant"])
def test_a_licence_that_allows_changed_copies_is_taken(name):
    require_derivable(name, any_license=False)


@pytest.mark.parametrize("name", ["cc-by-nd-4.0", "cc-by-nc-nd-3.0", "CC BY-NC-ND 4.0", "no-derivatives", "no derivative works"])
def test_a_licence_that_forbids_changed_copies_is_refused_unless_told(name):
    with pytest.raises(ReleaseError, match="which forbids changed copies, wanted one that allows them; .*publish.any_license=true"):
        require_derivable(name, any_license=False)
    require_derivable(name, any_license=True)


@pytest.mark.parametrize("name", ["other", "Unknown", " ", "proprietary"])
def test_a_licence_that_is_not_known_is_refused(name):
    with pytest.raises(ReleaseError, match="found .*, wanted one that is known; set base.license"):
        require_derivable(name, any_license=False)
