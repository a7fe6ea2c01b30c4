import pytest

from stages.errors import ReleaseError
from stages.release.licence import named_for_hub, require_derivable


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


# How the hub names it.


@pytest.mark.parametrize("name", ["apache-2.0", "cc-by-nc-4.0", "llama3.2", "llama3.3", "openrail", "openrail++", "gemma", "unknown"])
def test_a_licence_that_the_hub_lists_has_its_name(name):
    assert named_for_hub(name, ["LICENSE"], "org/small") == {"license": name}


@pytest.mark.parametrize("name", ["Apache-2.0", "APACHE-2.0", " apache-2.0 "])
def test_its_letters_may_be_of_another_case(name):
    assert named_for_hub(name, [], "small") == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("documents", "release", "link"),
    [
        (["NOTICE", "LICENSE"], "small", "LICENSE"),
        (["LICENSE.md"], "org/small", "LICENSE.md"),
        (["USE_POLICY.md", "LICENSE.txt"], "org/small", "https://huggingface.co/org/small/blob/main/LICENSE.txt"),
        (["NOTICE", "OUR_TERMS.html"], "org/small", "https://huggingface.co/org/small/blob/main/OUR_TERMS.html"),
    ],
)
def test_another_licence_is_named_and_linked_to_its_document_in_the_release(documents, release, link):
    named = {"license": "other", "license_name": "my own", "license_link": link}
    assert named_for_hub("my own", documents, release) == named


@pytest.mark.parametrize(("documents", "release"), [([], "org/small"), (["LICENSE.txt"], "small")])
def test_nothing_is_linked_where_there_is_no_document_or_no_repository_that_has_it(documents, release):
    assert named_for_hub("my own", documents, release) == {"license": "other", "license_name": "my own"}
