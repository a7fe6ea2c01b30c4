"""Record how a model calls its decoder blocks, and call one block alone.

The model's own forward pass runs with a stand-in module in place of every block, which receives the block's arguments; the model's own
code runs before and after the blocks. A block is run alone only if the outputs are those of the model: hidden states go from each block
to the next unchanged, and every other argument of a block is one of

- the same for every window,
- a tensor with an entry for each window, known before the first block, such as embeddings of the tokens for this block,
- something that the block before it returned besides hidden states,
- an empty mapping that all blocks receive, into which some write for others to read, such as keys and values that blocks share.

The last three go with the windows, see Stream. Anything else is refused.
"""

import enum
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stages.errors import ArchitectureError
from stages.streaming.architecture import unsupported
from stages.streaming.products import zeros_in

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, enum.Enum)


@dataclass(frozen=True, slots=True)
class Carried:
    """Stands for what the block before returned at this position of its outputs; position 0 are the hidden states.

    example: what it returned to a few tokens with zeros for weights.
    """

    position: int
    example: Any = field(compare=False, repr=False)

    def __getattr__(self, name: str) -> Any:
        raise _NotPlain("it uses what a block returns besides hidden states, wanted what only goes to the next block")

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise _NotPlain("it computes with what a block returns besides hidden states, wanted what only goes to the next block")


@dataclass(frozen=True, slots=True)
class Shared:
    """Stands for a mapping, empty before the first block, that blocks write into and later ones read from. kind: makes an empty one."""

    kind: type[MutableMapping[Any, Any]]


@dataclass(kw_only=True, slots=True)
class Call:
    """The arguments of one call of a block.

    hidden: [windows, tokens, width], or [windows, tokens, streams, width] of a model with several streams.
    arguments, keywords: all other arguments, such as masks, positions and rotary embeddings, as they were at the call.
    streams_first: whether the block itself wants and returns hidden states as [streams, windows, tokens, width].
    """

    hidden: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    streams_first: bool = False

    def named(self, block: nn.Module) -> dict[str, Any]:
        """The other arguments by the names of the parameters of the block's forward method."""
        return _named(block, self.arguments, self.keywords)

    def example(self, shared: dict[type, Any] | None = None) -> "Call":
        """The call with examples of what earlier blocks hand on, for a run with zeros for weights.

        Args:
            shared: the mappings that blocks share, by their kind; those that are not there yet are added. None: they stay stand-ins.
        """

        def example(value: Any) -> Any:
            if isinstance(value, Shared) and shared is not None:
                return shared.setdefault(value.kind, value.kind())
            return _example(value)

        keywords = {name: example(value) for name, value in self.keywords.items()}
        return replace(self, arguments=tuple(map(example, self.arguments)), keywords=keywords)

    def handed_on(self) -> list[Carried | Shared]:
        """What stands for something that an earlier block hands on."""
        values = (*self.arguments, *self.keywords.values())
        return [value for value in values if isinstance(value, (Carried, Shared))]

    def replacing(self, block: nn.Module, values: dict[str, Any]) -> "Call":
        """The call with other values of some arguments, by name."""
        if not values:
            return self
        names = list(_named(block, self.arguments, {}))
        arguments = tuple(values.get(name, value) for name, value in zip(names, self.arguments, strict=True))
        keywords = {name: values.get(name, value) for name, value in self.keywords.items()}
        return replace(self, arguments=arguments, keywords=keywords)


def block_outputs(block: nn.Module, hidden: torch.Tensor, call: Call) -> tuple[Any, ...]:
    """Run hidden states, [windows, tokens, width], through one loaded block with the recorded arguments.

    Returns:
        Hidden states of the same shape, and what else the block returns.
    """
    output = block(_streams_first(hidden) if call.streams_first else hidden, *call.arguments, **call.keywords)
    outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    return (outputs[0].movedim(0, 2), *outputs[1:]) if call.streams_first else outputs


def _streams_first(hidden: torch.Tensor) -> torch.Tensor:
    """From [windows, tokens, streams, width] to [streams, windows, tokens, width]."""
    return hidden.movedim(2, 0).contiguous()


def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The hidden states of block_outputs alone."""
    output: torch.Tensor = block_outputs(block, hidden, call)[0]
    return output


def record_calls(model: "PreTrainedModel", blocks: nn.ModuleList, input_ids: torch.Tensor) -> list[Call]:
    """Run the part of the model before the blocks, and record the arguments of each block.

    Args:
        model: with the weights before the blocks. blocks: the model's own list.
        input_ids: [windows, tokens], int64, on the model's device.

    Returns:
        One call per block; `hidden` of the first call is the input of the blocks.

    Raises:
        ArchitectureError: the blocks do not pass on plain hidden states, or have an argument that may change while they run;
            names the block and the argument.
    """
    recording = _Recording(list(blocks))
    with _standing_in(model, blocks, recording.add), suppress(_AllRecorded):
        model(input_ids=input_ids, use_cache=False)
    calls = recording.calls
    if len(calls) != len(blocks):
        raise unsupported(model, f"it runs {len(calls)} of its {len(blocks)} blocks, wanted each of them once and in order")
    if calls[0].hidden.dim() == 4 and calls[0].hidden.shape[1:3] == input_ids.shape:
        calls = [replace(call, hidden=call.hidden.movedim(0, 2), streams_first=True) for call in calls]
    if calls[0].hidden.shape[:2] != input_ids.shape or calls[0].hidden.dim() < 3:
        received = f"its blocks receive hidden states of shape {list(calls[0].hidden.shape)} for {list(input_ids.shape)} tokens"
        raise unsupported(model, f"{received}, wanted [windows, tokens, ...]")
    return calls


def run_after_blocks(model: "PreTrainedModel", blocks: nn.ModuleList, hidden: torch.Tensor, *, streams_first: bool = False) -> torch.Tensor:
    """Run the part of the model after the blocks.

    Args:
        model: with the weights after the blocks. hidden: [windows, tokens, width], the last block's output, on the model's device.
        streams_first: see Call.

    Returns:
        [windows, tokens, vocabulary], compute dtype.
    """
    width = model.get_input_embeddings().weight.shape[1]
    # NaN: what comes before the blocks runs, too, and must not reach the logits
    unused = torch.full((*hidden.shape[:2], width), torch.nan, dtype=hidden.dtype, device=hidden.device)

    def run(last: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        last = _streams_first(last) if streams_first else last
        with _standing_in(model, blocks, lambda *_: last):
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    try:
        return run(hidden, inputs_embeds=unused)
    except RuntimeError as error:
        if not raised_in(type(model).__module__, error):
            raise
    first, other = (run(hidden[:1, :1], input_ids=hidden.new_full((1, 1), token, dtype=torch.int64)) for token in (0, 1))  # it wants tokens
    if not torch.equal(first, other):
        raise unsupported(model, "its logits depend on tokens otherwise than through its blocks, wanted logits of hidden states alone")
    return run(hidden, input_ids=hidden.new_zeros(hidden.shape[:2], dtype=torch.int64))


def differing_arguments(
    model: "PreTrainedModel", blocks: nn.ModuleList, calls: list[Call], single: list[Call], windows: int
) -> list[dict[str, torch.Tensor]]:
    """Find the arguments of each block that have an entry of its own for each window; all others are the same, bit by bit.

    Args:
        calls: one call per block, for `windows` windows. single: one call per block, for one window of other tokens.

    Returns:
        For each block: name -> [windows, ...].

    Raises:
        ArchitectureError: an argument differs from window to window and is no such tensor; names the block and the argument.
    """
    same: dict[tuple[int, int], bool] = {}  # blocks receive the same tensors
    differing: list[dict[str, torch.Tensor]] = []
    for index, (block, call, single_call) in enumerate(zip(blocks, calls, single, strict=True)):
        received, expected = call.named(block), single_call.named(block)
        differing.append({})
        for name in received | expected:
            value: Any = received.get(name)
            other: Any = expected.get(name)
            key = (id(value), id(other))
            if key not in same:
                same[key] = name in received and name in expected and _repeats(value, other, windows)
            if same[key]:
                continue
            if not _has_windows(value, other, windows):
                difference = f"the argument {name!r} of block {index} ({type(value).__qualname__}) differs from window to window"
                raise unsupported(model, f"{difference}, wanted what is the same for all, or a tensor with an entry for each")
            differing[index][name] = value
    return differing


def require_own(model: "PreTrainedModel", index: int, name: str, entry: torch.Tensor, alone: torch.Tensor) -> None:
    """Refuse an argument whose entry for a window depends on the windows beside it, such as an index into them.

    Args:
        entry: for one window of several, [...]. alone: for the same window alone, [1, ...].

    Raises:
        ArchitectureError: names the block and the argument.
    """
    exact = not entry.is_floating_point()
    if not (torch.equal(entry, alone[0]) if exact else torch.allclose(entry, alone[0], rtol=1e-2, atol=1e-4)):
        reason = f"the argument {name!r} of block {index} depends on the windows beside it, wanted entries of the windows themselves"
        raise unsupported(model, reason)


def _has_windows(value: Any, single: Any, windows: int) -> bool:
    """Whether an argument is a tensor with an entry for each window, like that for one window."""
    tensors = isinstance(value, torch.Tensor) and isinstance(single, torch.Tensor)
    return tensors and value.dtype == single.dtype and value.shape == (windows, *single.shape[1:]) and len(single) == 1


def require_unchanged(model: "PreTrainedModel", index: int, block: nn.Module, calls: list[Call]) -> None:
    """Refuse a model whose block wrote into an argument.

    Args:
        index: index of the block. calls: the block's calls, one for each number of windows.

    Raises:
        ArchitectureError: names the block and the argument.
    """
    for call in calls:
        for name, value in call.named(block).items():
            if any(tensor._version for tensor in _tensors(value)):
                raise unsupported(model, f"block {index} writes into its argument {name!r}, wanted blocks that only read it")


def raised_in(module: str, error: BaseException) -> bool:
    """Whether an error was raised by a statement of the module itself, not by a function of another module that it called."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__") == module


class _AllRecorded(Exception):
    """Raised at the call of the last block: the part of the model after the blocks is not needed."""


class _NotPlain(Exception):
    """Raised by stand-ins; the message says why the model cannot be run block by block."""


class _StandIn(nn.Module):
    """Replaces a block in the list of blocks; reading an attribute that it lacks reads the block's.

    Args:
        returns: computes the hidden states that it returns from the arguments and keywords of the call.
    """

    def __init__(self, block: nn.Module, returns: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor]) -> None:
        super().__init__()
        self.__dict__["_of_stand_in"] = block, returns  # one name, so that it hides none of the block's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._of_stand_in[0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        block, returns = self._of_stand_in
        output: Any = returns(arguments, keywords).as_subclass(_Output)
        output.returned = partial(_returned, block, arguments, keywords)
        return output


class _Recording:
    """The arguments of the blocks in one forward pass. A tensor that several blocks receive is copied once."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.calls: list[Call] = []
        self._mappings: dict[str, MutableMapping[Any, Any]] = {}  # that blocks share
        self._version = 0  # of the hidden states when they were handed on
        self._copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # with the original, which keeps its id

    def add(self, index: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
        """Record the call of a block, and return its hidden states.

        Raises:
            _NotPlain: the block would receive other arguments if it were run alone.
            _AllRecorded: this was the last block.
        """
        if index != len(self.calls):
            raise _NotPlain(f"block {index} runs after {len(self.calls)} others, wanted each block once and in order")
        if not arguments or not isinstance(arguments[0], torch.Tensor):
            raise _NotPlain(f"block {index} does not receive hidden states as its first argument")
        hidden, others = arguments[0].as_subclass(torch.Tensor), arguments[1:]
        if self.calls and (self.calls[-1].hidden._version != self._version or not _repeats(hidden, self.calls[0].hidden, 1)):
            raise _NotPlain(f"block {index} receives other hidden states than block {index - 1} returns")
        for name, value in _named(self.blocks[index], others, keywords).items():
            if (unknown := _changeable(value)) is not None:
                wanted = "tensors, numbers, strings, None, and tuples and dicts of them"
                raise _NotPlain(f"block {index} receives a {unknown} as its argument {name!r}, wanted {wanted}")
            if isinstance(value, MutableMapping) and not value and self._mappings.setdefault(name, value) is not value:
                raise _NotPlain(f"block {index} receives another {name!r} than blocks before it, wanted one mapping for all of them")
        copies = {name: self._copy(value) for name, value in keywords.items()}
        self.calls.append(Call(hidden=hidden, arguments=tuple(map(self._copy, others)), keywords=copies))
        self._version = hidden._version
        if len(self.calls) == len(self.blocks):
            if self.blocks[index - 1] in _BESIDES:
                _returned(self.blocks[index], arguments, keywords)  # while there are examples for as many tokens
            raise _AllRecorded
        return hidden

    def _copy(self, value: Any) -> Any:
        """Copy a value."""
        if isinstance(value, tuple):
            return tuple(map(self._copy, value))
        if isinstance(value, MutableMapping) and not value:
            return Shared(type(value))
        if isinstance(value, dict):
            return _ReadOnly((key, self._copy(item)) for key, item in value.items())
        if not isinstance(value, torch.Tensor):
            return value
        key = (id(value), value._version)
        if key not in self._copies:
            self._copies[key] = (value, value.detach().as_subclass(torch.Tensor).clone())
        return self._copies[key][1]


class _ReadOnly(dict[Any, Any]):
    """A dict that a block reads and must not write: it would be state that goes from window to window."""

    def __setitem__(self, key: Any, _: Any) -> None:
        raise ArchitectureError(f"a block writes {key!r} into a dict that it receives, wanted blocks that only read their arguments")


_BESIDES: WeakKeyDictionary[nn.Module, list[Carried | None] | None] = WeakKeyDictionary()


def _returned(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Carried | None] | None:
    """Stand-ins for what a block returns after the hidden states, or None where it returns these alone and no tuple.

    A run with zeros for weights, once, shows how many there are and which are None.
    """
    if block not in _BESIDES:
        with torch.no_grad(), zeros_in(block):
            output = block(*map(_example, arguments), **{name: _example(value) for name, value in keywords.items()})
        several = isinstance(output, (tuple, list))
        numbered = enumerate(output[1:], start=1) if several else ()
        _BESIDES[block] = [None if value is None else Carried(position, value) for position, value in numbered] if several else None
    return _BESIDES[block]


class _Output(torch.Tensor):
    """The hidden states that a stand-in returns, for models that expect a tensor and for those that expect a tuple that it begins.

    Of several streams of hidden states, an index may be meant for a stream or for the tuple: the block shows which.

    returned: makes stand-ins for the rest of the tuple; None where the block returns no tuple.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results of operations are plain tensors
    returned: Callable[[], list[Carried | None] | None]

    @property
    def besides(self) -> list[Carried | None]:
        """Stand-ins for the rest of the tuple.

        Raises:
            _NotPlain: the block returns hidden states alone.
        """
        besides = self.returned()
        if besides is None:
            raise _NotPlain("it takes hidden states apart, wanted hidden states that go from block to block unchanged")
        return besides

    def __getitem__(self, index: Any) -> Any:
        hidden = self.as_subclass(torch.Tensor)
        if not isinstance(index, (int, slice)) or (hidden.dim() > 3 and self.returned() is None):
            return hidden[index]
        return hidden if index == 0 else (hidden, *self.besides)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.as_subclass(torch.Tensor), *self.besides))

    def __len__(self) -> int:
        return 1 + len(self.besides)


@contextmanager
def _standing_in(
    model: "PreTrainedModel", blocks: nn.ModuleList, returns: Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]
) -> Iterator[None]:
    """Replace each block by a stand-in; see _StandIn. The first argument of `returns` is the index of the block."""
    originals = list(blocks)
    for index, block in enumerate(originals):
        blocks[index] = _StandIn(block, partial(returns, index))
    try:
        yield
    except _NotPlain as reason:
        raise unsupported(model, str(reason)) from None
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


def _example(value: Any) -> Any:
    """An argument for a run with zeros for weights."""
    return value.example if isinstance(value, Carried) else value


def _named(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments after the hidden states, by parameter name, or by position where there are no more names."""
    names = list(inspect.signature(block.forward).parameters)[1:]
    names += [str(position) for position in range(len(names) + 1, len(arguments) + 1)]
    return dict(zip(names, arguments, strict=False)) | keywords


def _changeable(value: Any) -> str | None:
    """The type of a value that may change or hold state otherwise than the head of this file says; None for all others."""
    if isinstance(value, MutableMapping) and not value:
        return None
    if type(value) in (tuple, dict):
        items = value if type(value) is tuple else (*value, *value.values())
        return next((name for item in items if (name := _changeable(item)) is not None), None)
    return None if isinstance(value, (torch.Tensor, Carried, *CONSTANTS)) else type(value).__qualname__


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _repeats(value: Any, single: Any, windows: int) -> bool:
    """Whether an argument for several windows equals that for one window, or repeats it once per window; tensors bit by bit."""
    if type(value) is not type(single):
        return False
    if isinstance(value, torch.Tensor):
        return value.dtype == single.dtype and _tensor_repeats(value, single, windows)
    if isinstance(value, tuple):
        return len(value) == len(single) and all(_repeats(*pair, windows) for pair in zip(value, single, strict=True))
    if isinstance(value, dict):
        return value.keys() == single.keys() and all(_repeats(value[key], single[key], windows) for key in value)
    return value == single


def _tensor_repeats(value: torch.Tensor, single: torch.Tensor, windows: int) -> bool:
    if value.shape == single.shape:
        return torch.equal(value, single)
    if value.dim() != single.dim():
        return False
    differing = [dim for dim, (length, single_length) in enumerate(zip(value.shape, single.shape, strict=True)) if length != single_length]
    if len(differing) != 1 or value.shape[differing[0]] != windows * single.shape[differing[0]]:
        return False
    return all(torch.equal(chunk, single) for chunk in value.chunk(windows, dim=differing[0]))
