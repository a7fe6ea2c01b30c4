"""The activations that a paused forward pass holds: counted, and moved to a buffer elsewhere and back.

What a paused pass holds are tensors in local variables of code that knows nothing of it. A dispatch mode sees every tensor that an
operation makes, and notes its storage without keeping it alive. Of a storage that is moved, the memory is freed and the object stays, so
that all tensors that view it are whole again as soon as it is filled.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class Activations(TorchDispatchMode):
    """The storages that operations make while this mode is active.

    Args:
        moved: storages of all passes that are not in memory now -> how to bring them back. An operation of another pass that reads one,
            which a module kept, brings it back.

    Attributes:
        is_noting: whether operations are looked at; False while they make what is to outlive the pass.
        buffer: holds what was moved last, and is used again where it is large enough; or None.
    """

    def __init__(self, moved: "dict[StorageWeakRef, Activations]") -> None:
        super().__init__()
        self.is_noting = True
        self._made: dict[StorageWeakRef, None] = {}
        self._moved, self._copies = moved, dict[StorageWeakRef, torch.Tensor]()
        self.buffer: torch.Tensor | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No code that is compiled runs in this mode; what torch does for such code by default imports its compiler, for seconds."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if not self.is_noting:
            return function(*arguments, **keywords)
        read = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors((arguments, keywords))}
        for storage in read & self._moved.keys() if self._moved else ():
            self._moved[storage].bring_back()
        output = function(*arguments, **keywords)
        for tensor in _tensors(output):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in read and storage not in self._made:
                self._made[storage] = None
        return output

    def _held(self) -> list[tuple[StorageWeakRef, torch.UntypedStorage]]:
        """The storages that something still holds."""
        storages = [(reference, torch.UntypedStorage._new_with_weak_ptr(reference.cdata)) for reference in self._made]
        held = [(reference, storage) for reference, storage in storages if storage is not None]
        self._made = {reference: None for reference, _ in held}
        return held

    def bytes(self) -> int:
        """Of memory that they take now."""
        return sum(storage.nbytes() for _, storage in self._held())

    def move_to_buffer(self, allocate: Allocate) -> None:
        """Copy them into one buffer and free their memory.

        Args:
            allocate: makes a tensor of a shape and dtype outside of the memory that is to be saved.
        """
        held = [(reference, storage) for reference, storage in self._held() if storage.nbytes() and storage.resizable()]
        needed = sum(storage.nbytes() for _, storage in held)
        if self.buffer is None or len(self.buffer) < needed:
            self.buffer = None  # it is freed before the next one is made
            self.buffer = allocate((needed,), torch.uint8)
        free = self.buffer
        for reference, storage in held:
            self._copies[reference], free = free.tensor_split([storage.nbytes()])
            self._copies[reference].copy_(_bytes_of(storage), non_blocking=True)  # a GPU's stream keeps the order
            self._moved[reference] = self
            storage.resize_(0)

    def bring_back(self) -> None:
        """Fill the storages that were moved."""
        while self._copies:
            reference, copy = self._copies.popitem()
            del self._moved[reference]
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                storage.resize_(len(copy))
                _bytes_of(storage).copy_(copy, non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A view of all its bytes, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
