import pytest
import torch

from stages.config.entry import is_out_of_memory


def test_torchs_error_of_a_system_without_memory_is_known_by_its_words():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
