import pytest
import torch

from stages.errors import ArchitectureError, PruningError
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import Stream, read_ahead

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))
NEEDED = WINDOWS.numel() * 32 * 4  # bytes of the hidden states


@pytest.fixture()
def decoder(base) -> Decoder:
    return Decoder(base, torch.float32, CPU)


def stream_of(decoder: Decoder, windows: torch.Tensor = WINDOWS, batch: int = 2, **how) -> Stream:
    with decoder.before_blocks():
        return Stream(decoder, windows, batch=batch, **how)


def test_hidden_states_that_are_not_finite_name_the_block(decoder):
    stream = stream_of(decoder)
    members = slice(0, 1)
    stream.put(0, members, (stream.hidden[:1] * float("inf"),), stream.call(0, members))
    with pytest.raises(PruningError, match="block 7: found NaN or infinity in its outputs"):
        stream.require_finite(7)


def test_hidden_states_beyond_the_budget_lie_in_a_file_that_leaves_no_trace_and_change_nothing(decoder, tmp_path):
    in_memory, in_file = (stream_of(decoder, memory=HostMemory(budget, tmp_path)) for budget in (NEEDED, NEEDED - 1))
    assert (in_memory.location, in_file.location) == ("memory", f"a file of 0.00 GB in {tmp_path}")
    assert torch.equal(in_memory.hidden, in_file.hidden)
    assert not list(tmp_path.iterdir())
    with decoder.loaded(0, decoder.read(0)) as block:
        for stream in (in_memory, in_file):
            stream.advance(0, block)
    assert torch.equal(in_memory.hidden, in_file.hidden)


def test_a_clone_begins_where_the_stream_is_and_goes_its_own_way(decoder):
    stream = stream_of(decoder)
    with decoder.loaded(0, decoder.read(0)) as block:
        stream.advance(0, block)
        once = stream.hidden.clone()
        clone = stream.clone()
        assert torch.equal(clone.hidden, once)
        clone.advance(0, block)
    assert torch.equal(stream.hidden, once)
    assert not torch.equal(clone.hidden, once)


def test_a_stream_and_its_clones_take_their_buffers_from_one_memory(decoder, tmp_path):
    stream = stream_of(decoder, memory=HostMemory(3 * NEEDED - 1, tmp_path))
    first = stream.clone()
    assert first.location == "memory"
    assert stream.memory is first.memory
    assert stream.memory.left == NEEDED - 1
    assert first.host_buffer((NEEDED - 5,), torch.int8).shape == (NEEDED - 5,)
    assert stream.memory.left == 4
    assert stream.clone().location == f"a file of 0.00 GB in {tmp_path}"


def test_single_windows_are_called_as_the_batch_is(decoder):
    stream = stream_of(patched(decoder, "more", lambda windows: torch.arange(3).repeat(len(windows), 1)))
    hidden, call = stream.window(1, 4)
    assert torch.equal(hidden, stream.hidden[4:])
    assert call.keywords["more"].tolist() == [[0, 1, 2]]
    assert [call.keywords["more"].shape for _, _, call in stream.parts(1)] == [(2, 3), (2, 3), (1, 3)]


def patched(decoder: Decoder, name: str, make) -> Decoder:
    """One whose second block receives one thing more, made of the windows."""
    calls = decoder.calls

    def with_more(windows):
        made = calls(windows)
        made[1].keywords[name] = make(windows)
        return made

    decoder.calls = with_more
    return decoder


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("windows", [WINDOWS, WINDOWS[:1]])
def test_what_differs_from_window_to_window_goes_with_the_windows_whatever_the_batch(decoder, batch, windows):
    """In one pass alone, or for one window alone, nothing else would show that the argument is made of the tokens."""
    stream = stream_of(patched(decoder, "tokens", lambda windows: windows), windows, batch=batch)
    received = [call.keywords["tokens"] for _, _, call in stream.parts(1)]
    assert torch.equal(torch.cat(received), windows)
    assert torch.equal(stream.window(1, len(windows) - 1)[1].keywords["tokens"], windows[-1:])
    assert "tokens" not in stream.window(0, 0)[1].keywords


def test_an_entry_that_is_the_same_by_chance_in_the_first_windows_is_that_of_these_windows(decoder):
    stream = stream_of(patched(decoder, "first", lambda windows: (windows == WINDOWS[4]).all(dim=1)))
    assert torch.cat([call.keywords["first"] for _, _, call in stream.parts(1)]).tolist() == [False] * 4 + [True]


def test_a_block_that_writes_into_an_entry_changes_it_for_no_other_pass(decoder):
    stream = stream_of(patched(decoder, "tokens", lambda windows: windows))
    for _, _, call in stream.parts(1):
        call.keywords["tokens"].zero_()
    assert torch.equal(torch.cat([call.keywords["tokens"] for _, _, call in stream.parts(1)]), WINDOWS)


def test_what_depends_on_the_windows_beside_a_window_is_refused(decoder):
    patched(decoder, "scale", lambda windows: torch.full((len(windows), 1), float(len(windows))))
    with pytest.raises(ArchitectureError, match="the argument 'scale' of block 1 depends on the windows beside it"):
        stream_of(decoder)


def test_a_number_of_windows_is_no_argument_that_is_the_same(decoder):
    with pytest.raises(ArchitectureError, match=r"the argument 'count' of block 1 \(int\) differs from window to window"):
        stream_of(patched(decoder, "count", len))


@pytest.mark.parametrize("make", [lambda windows: torch.ones(3, len(windows), 7), lambda windows: torch.arange(4.0).repeat(len(windows))])
def test_what_is_repeated_for_each_window_in_any_dimension_is_the_same(decoder, make):
    assert stream_of(patched(decoder, "more", make)).calls.keys() == {1, 2}


def test_a_block_that_writes_into_what_it_receives_is_refused(decoder):
    stream = stream_of(decoder)

    def write(module, arguments, keywords):
        keywords["position_ids"].add_(1)

    decoder.blocks[1].register_forward_pre_hook(write, with_kwargs=True)
    with decoder.loaded(0, decoder.read(0)) as block:
        stream.advance(0, block)
    reason = "mistral: block 1 writes into its argument 'position_ids', wanted blocks that only read it"
    with decoder.loaded(1, decoder.read(1)) as block, pytest.raises(ArchitectureError, match=reason):
        stream.advance(1, block)


def test_blocks_are_read_ahead_in_the_order_asked_for(decoder):
    with read_ahead(decoder, range(2, -1, -1)) as blocks:
        names = [sorted(tensors) for tensors in blocks]
    assert names == [sorted(decoder.tensors(index)) for index in (2, 1, 0)]
