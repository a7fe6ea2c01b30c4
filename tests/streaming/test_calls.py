"""What blocks receive, on a decoder of a few lines whose way of calling its blocks each test chooses."""

import enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.errors import ArchitectureError
from stages.streaming.calls import (
    Call,
    Carried,
    Shared,
    differing_arguments,
    record_calls,
    require_own,
    require_unchanged,
    run_after_blocks,
    run_block,
)

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Color(enum.Enum):
    RED = 1


class Block(nn.Module):
    output = "an attribute"

    def forward(self, hidden, mask=None, more=None):
        return hidden + 1


class Tiny(nn.Module):
    """call: runs one block, given it, hidden states, the tokens and the index; returns hidden states."""

    def __init__(self, call, count: int = 3) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="tiny")
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.call = call

    def get_input_embeddings(self):
        return self.embedding

    @torch.no_grad()
    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None):
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        for index, block in enumerate(self.blocks):
            hidden = self.call(block, hidden, input_ids, index)
        return SimpleNamespace(logits=self.head(hidden))


def recorded(call, ids: torch.Tensor = IDS) -> list[Call]:
    model = Tiny(call)
    return record_calls(model, model.blocks, ids)


def test_every_block_is_recorded_with_what_it_receives():
    calls = recorded(lambda block, hidden, ids, index: block(hidden, None, more=(index, torch.ones(2), "word", torch.float32, Color.RED)))
    assert [call.arguments for call in calls] == [(None,)] * 3
    assert [call.keywords["more"][0] for call in calls] == [0, 1, 2]
    assert calls[0].hidden.shape == (2, 3, 4)
    assert calls[0].named(Block()).keys() == {"mask", "more"}


@pytest.mark.parametrize("take", [lambda output: output, lambda output: output[0], lambda output: output[0] * 1])
def test_hidden_states_are_taken_as_they_are_or_as_the_first_of_a_tuple(take):
    assert len(recorded(lambda block, hidden, ids, index: take(block(hidden)))) == 3


def unpacked(output):
    hidden, _ = output
    return hidden


TAKES = [unpacked, lambda output: output[:2][0], lambda output: output[0] if len(output) == 2 else None]


@pytest.mark.parametrize("take", [*TAKES, lambda output: output[1]])
def test_hidden_states_are_not_taken_apart(take):
    reason = "it takes hidden states apart, wanted hidden states that go from block to block unchanged"
    with pytest.raises(ArchitectureError, match=f"^tiny: {reason}; this architecture is not supported$"):
        recorded(lambda block, hidden, ids, index: take(block(hidden)))


class Several(Block):
    """Returns a second tensor, and None."""

    def forward(self, hidden, mask=None, more=None):
        return hidden + 1, hidden.sum(dim=-1), None


def calls_of_several(call) -> list[Call]:
    model = Tiny(call)
    for index in range(3):
        model.blocks[index] = Several()
    return record_calls(model, model.blocks, IDS)


def test_what_else_a_block_returns_is_known_and_may_go_to_the_next_block():
    carried = []

    def call(block, hidden, ids, index):
        hidden, sums, nothing = block(hidden, nothing_of(carried), more=carried[-1] if carried else None)
        carried.append(sums)
        assert nothing is None
        return hidden

    def nothing_of(carried):
        return None

    calls = calls_of_several(call)
    assert [recorded.keywords["more"] for recorded in calls] == [None, Carried(1, None), Carried(1, None)]
    assert [recorded.handed_on() for recorded in calls] == [[], [Carried(1, None)], [Carried(1, None)]]
    assert calls[1].example().keywords["more"].shape == (2, 3)


@pytest.mark.parametrize(("use", "verb"), [(lambda sums: sums.mean(), "uses"), (lambda sums: torch.ones(2) * sums, "computes with")])
def test_what_else_a_block_returns_is_not_computed_with(use, verb):
    def call(block, hidden, ids, index):
        hidden, sums, _ = block(hidden)
        use(sums)
        return hidden

    with pytest.raises(ArchitectureError, match=f"^tiny: it {verb} what a block returns besides hidden states"):
        calls_of_several(call)


def test_the_blocks_are_in_their_places_again_whatever_happens():
    model = Tiny(lambda block, hidden, ids, index: unpacked(block(hidden)))
    blocks = list(model.blocks)
    with pytest.raises(ArchitectureError, match="takes hidden states apart"):
        record_calls(model, model.blocks, IDS)
    assert list(model.blocks) == blocks


def test_a_stand_in_has_the_attributes_of_its_block():
    seen = []
    recorded(lambda block, hidden, ids, index: seen.append(block.output) or block(hidden))
    assert seen == ["an attribute"] * 3


class Cache:
    """A state that blocks would write into."""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Cache(), "Cache"),
        ({"mask": [torch.ones(1)]}, "list"),
        ([], "list"),
        ((None, (1, [torch.ones(1)])), "list"),
        (lambda: None, "function"),
        (nn.Linear(1, 1), "Linear"),
    ],
)
def test_what_blocks_could_keep_a_state_in_is_refused_by_block_argument_and_type(value, kind):
    for call in (lambda block, *rest: block(rest[0], None, value), lambda block, *rest: block(rest[0], more=value)):
        wanted = "wanted tensors, numbers, strings, None, and tuples and dicts of them"
        with pytest.raises(
            ArchitectureError,
            match=f"^tiny: block 0 receives a .*{kind} as its argument 'more', {wanted}; this architecture is not supported$",
        ):
            recorded(call)


def test_an_empty_mapping_that_all_blocks_receive_is_one_that_they_share():
    shared = {}
    calls = recorded(lambda block, hidden, ids, index: block(hidden, more=shared))
    assert [call.keywords["more"] for call in calls] == [Shared(dict)] * 3


def test_an_empty_mapping_of_each_block_alone_is_refused():
    reason = "block 1 receives another 'more' than blocks before it, wanted one mapping for all of them"
    with pytest.raises(ArchitectureError, match=f"tiny: {reason}"):
        recorded(lambda block, hidden, ids, index: block(hidden, more={}))


def test_a_dictionary_of_tensors_is_recorded_and_blocks_cannot_write_into_it():
    calls = recorded(lambda block, hidden, ids, index: block(hidden, more={"mask": torch.ones(1)}))
    assert calls[0].keywords["more"] == {"mask": torch.ones(1)}
    with pytest.raises(ArchitectureError, match="a block writes 'other' into a dict that it receives"):
        calls[0].keywords["more"]["other"] = 1


def test_a_tensor_is_recorded_as_it_was_when_the_block_was_called():
    counter = torch.zeros(1)
    calls = recorded(lambda block, hidden, ids, index: block(hidden, more=counter.add_(1)))
    assert [call.keywords["more"].item() for call in calls] == [1, 2, 3]


def test_a_tensor_that_all_blocks_receive_is_copied_once():
    mask = torch.ones(3)
    calls = recorded(lambda block, hidden, ids, index: block(hidden, mask))
    assert len({call.arguments[0].data_ptr() for call in calls}) == 1
    assert calls[0].arguments[0].data_ptr() != mask.data_ptr()


@pytest.mark.parametrize("change", [lambda hidden: hidden * 2, lambda hidden: hidden.mul_(2), lambda hidden: hidden.double()])
def test_hidden_states_that_change_between_blocks_are_refused(change):
    with pytest.raises(ArchitectureError, match="tiny: block 1 receives other hidden states than block 0 returns; .* not supported"):
        recorded(lambda block, hidden, ids, index: change(block(hidden)))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda block, hidden, ids, index: block(hidden) if index else hidden, "block 1 runs after 0 others"),
        (lambda block, hidden, ids, index: hidden if index == 2 else block(hidden), "it runs 2 of its 3 blocks"),
        (lambda block, hidden, ids, index: block(block(hidden)), "block 0 runs after 1 others"),
    ],
)
def test_blocks_that_do_not_run_once_and_in_order_are_refused(call, reason):
    with pytest.raises(ArchitectureError, match=f"tiny: {reason}, wanted (each block|each of them) once and in order; .* not supported"):
        recorded(call)


def test_hidden_states_that_are_not_one_for_each_token_are_refused():
    reason = r"its blocks receive hidden states of shape \[2, 4, 4\] for \[2, 3\] tokens, wanted \[windows, tokens, ...\]"
    with pytest.raises(ArchitectureError, match=f"tiny: {reason}"):
        recorded(lambda block, hidden, ids, index: block(torch.zeros(2, 4, 4)))


def test_hidden_states_come_first():
    with pytest.raises(ArchitectureError, match="tiny: block 0 does not receive hidden states as its first argument"):
        recorded(lambda block, hidden, ids, index: block(hidden=hidden))


def differing(call) -> list[dict[str, torch.Tensor]]:
    """Compare what blocks receive for two windows with what they receive for one of other tokens."""
    model = Tiny(call)
    calls, single = (record_calls(model, model.blocks, ids) for ids in (IDS, IDS[:1] + 1))
    return differing_arguments(model, model.blocks, calls, single, windows=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda hidden, ids: (None, (ids[:1],)),
        lambda hidden, ids: ids.T,
        lambda hidden, ids: ids.sum().item(),
        lambda hidden, ids: len(ids),
        lambda hidden, ids: None if len(ids) == 1 else torch.ones(1),
        lambda hidden, ids: torch.ones(1, dtype=torch.float32 if len(ids) == 1 else torch.float64),
        lambda hidden, ids: torch.ones(len(ids), len(ids)),
    ],
)
def test_an_argument_that_is_not_the_same_is_refused_by_name(make):
    with pytest.raises(ArchitectureError, match=r"tiny: the argument 'more' of block 0 \(\w+\) differs from window to window"):
        differing(lambda block, hidden, ids, index: block(hidden, more=make(hidden, ids)))


def test_an_argument_that_only_some_windows_come_with_is_refused_by_name():
    with pytest.raises(ArchitectureError, match=r"the argument 'mask' of block 0 \(\w+\) differs from window to window"):
        differing(lambda block, hidden, ids, index: block(hidden) if len(ids) == 1 else block(hidden, None))


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: torch.ones(1, 1, 3, 3),
        lambda ids: torch.arange(3.0).repeat(len(ids), 1),
        lambda ids: torch.arange(3.0).repeat(2 * len(ids), 1),
        lambda ids: torch.arange(3.0).repeat(4, len(ids)),
        lambda ids: (1, "word", True, None, torch.float16, torch.device("cpu"), Color.RED, (torch.zeros(0),)),
    ],
)
def test_an_argument_is_the_same_for_all_windows_at_once_or_again_for_each(make):
    assert not any(differing(lambda block, hidden, ids, index: block(hidden, more=make(ids))))


@pytest.mark.parametrize("make", [lambda hidden, ids: ids, lambda hidden, ids: hidden.detach(), lambda hidden, ids: torch.arange(len(ids))])
def test_a_tensor_with_an_entry_for_each_window_is_found(make):
    found = differing(lambda block, hidden, ids, index: block(hidden, more=make(hidden, ids)))
    assert [(name, len(tensor)) for of_block in found for name, tensor in of_block.items()] == [("more", 2)] * 3


def test_an_entry_that_depends_on_the_windows_beside_it_is_refused():
    model = Tiny(lambda block, hidden, ids, index: block(hidden))
    require_own(model, 0, "more", torch.ones(3), torch.full((1, 3), 1 + 1e-6))
    for entry, alone in ((torch.tensor(1), torch.tensor([0])), (torch.ones(3), torch.zeros(1, 3))):
        with pytest.raises(ArchitectureError, match="tiny: the argument 'more' of block 0 depends on the windows beside it"):
            require_own(model, 0, "more", entry, alone)


def test_a_block_that_writes_into_a_tensor_is_refused_by_name():
    model = Tiny(lambda block, hidden, ids, index: block(hidden, more=(1, torch.ones(2))))
    calls = record_calls(model, model.blocks, IDS)
    require_unchanged(model, 1, model.blocks[1], calls[1:2])
    calls[1].keywords["more"][1][0] = 3
    with pytest.raises(ArchitectureError, match="tiny: block 1 writes into its argument 'more', wanted blocks that only read it"):
        require_unchanged(model, 1, model.blocks[1], calls[1:2])


@pytest.mark.parametrize("wrap", [lambda output: output, lambda output: (output, None), lambda output: [output]])
def test_a_block_alone_gives_its_hidden_states(wrap):
    block = Block()
    block.register_forward_hook(lambda _, __, output: wrap(output))
    call = Call(hidden=torch.zeros(0), arguments=(None,), keywords={"more": 1})
    assert torch.equal(run_block(block, torch.zeros(1, 2, 4), call), torch.ones(1, 2, 4))


@pytest.mark.parametrize("take", [lambda output: output, lambda output: output[0]])
def test_logits_are_those_of_the_hidden_states_and_so_are_their_gradients(take):
    model = Tiny(lambda block, hidden, ids, index: take(block(hidden)))
    model.forward = model.forward.__wrapped__.__get__(model)  # with gradients
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    logits = run_after_blocks(model, model.blocks, hidden)
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, model.head(hidden))
    found, expected = (torch.autograd.grad(output.square().sum(), hidden)[0] for output in (logits, model.head(hidden)))
    assert torch.equal(found, expected)


def test_logits_that_need_what_comes_before_the_blocks_are_no_numbers():
    entered = []

    def call(block, hidden, ids, index):
        entered.append(hidden)
        return block(hidden) + entered[0] if index == 2 else block(hidden)

    model = Tiny(call)
    assert run_after_blocks(model, model.blocks, torch.zeros(1, 2, 4)).isnan().all()
