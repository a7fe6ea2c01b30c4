import pytest
import torch

from stages.errors import SparsesweepError
from stages.evaluation.journal import opened


def fail(directory, fingerprint, act):
    """Use a journal and fail."""
    with pytest.raises(KeyboardInterrupt), opened(directory, fingerprint) as journal:
        act(journal)
        raise KeyboardInterrupt


def test_finished_parts_are_there_for_the_next_run_and_gone_after_its_success(tmp_path):
    directory = tmp_path / "journal"
    windows = {"articles": {"nll": torch.rand(2, 3)}, "other pages": {"nll": torch.rand(1, 2), "kld": torch.rand(1, 2)}}

    def act(journal):
        journal.observed(lambda: windows)
        journal.write([1, 2], "answers", "raw", "a::b c")

    fail(directory, {"a": 1}, act)
    with opened(directory, {"a": 1}) as journal:
        found = journal.observed(lambda: pytest.fail("computed again"))
        assert {name: set(of) for name, of in found.items()} == {name: set(of) for name, of in windows.items()}
        assert all(torch.equal(found[name][key], value) for name, of in windows.items() for key, value in of.items())
        assert journal.has("answers", "raw", "a::b c")
        assert journal.read("answers", "raw", "a::b c") == [1, 2]
        assert not journal.has("answers", "chat", "a::b c")
    assert not directory.exists()


def test_another_fingerprint_begins_afresh(tmp_path):
    directory = tmp_path / "journal"
    fail(directory, {"a": 1}, lambda journal: journal.write([], "generations"))
    with opened(directory, {"a": 2}) as journal:
        assert not journal.has("generations")


def test_a_half_written_part_is_not_finished(tmp_path):
    directory = tmp_path / "journal"
    fail(directory, {"a": 1}, lambda journal: journal._path("generations").with_suffix(".part").write_text("[1"))
    with opened(directory, {"a": 1}) as journal:
        assert not journal.has("generations")


def test_a_second_run_is_refused(tmp_path):
    directory, wanted = tmp_path / "journal", "journal: another run is evaluating here; wait for it or stop it"
    with opened(directory, {}), pytest.raises(SparsesweepError, match=wanted), opened(directory, {}):
        pass


def test_damaged_windows_are_named_and_a_damaged_fingerprint_begins_afresh(tmp_path):
    directory = tmp_path / "journal"
    fail(directory, {"a": 1}, lambda journal: (directory / "windows.safetensors").write_bytes(b"no tensors"))
    with pytest.raises(SparsesweepError, match="windows.safetensors: damaged .*; remove .*journal and run again"):
        fail(directory, {"a": 1}, lambda journal: journal.observed(dict))
    (directory / "fingerprint.json").write_bytes(b"\xff")
    with opened(directory, {"a": 1}) as journal:
        assert journal.observed(dict) == {}
