import io

import pytest

from stages.errors import SourceError
from stages.sources.bounds import copy_whole, read_whole


def test_a_stream_is_read_up_to_its_bound():
    assert read_whole(io.BytesIO(b"abc"), "it", 3) == b"abc"
    with pytest.raises(SourceError, match="it: found more than 2 bytes, wanted at most that"):
        read_whole(io.BytesIO(b"abc"), "it", 2)


def test_a_stream_is_copied_up_to_its_bound():
    copy_whole(io.BytesIO(b"abc"), target := io.BytesIO(), "it", 3)
    assert target.getvalue() == b"abc"
    with pytest.raises(SourceError, match="it: found more than 2 bytes, wanted at most that"):
        copy_whole(io.BytesIO(b"abc"), target := io.BytesIO(), "it", 2)
    assert target.getvalue() == b""
