"""A decoder language model whose weights are read and loaded one block at a time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from stages.checkpoint.layout import ParameterSlice, read_layout, tied_names
from stages.checkpoint.model import dematerialize, empty_model, materialize, parameter_dtype, put
from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError
from stages.streaming.architecture import Layer, Matrix, find_blocks, tensors_by_block, unsupported
from stages.streaming.calls import Call, raised_in, record_calls, run_after_blocks
from stages.streaming.reading import ReadingOrder, reading_orders
from stages.streaming.scope import find_matrices

TOKENS_AT_ONCE = 256  # whose logits are in memory where weights are trained or gradients are taken


class Decoder:
    """A decoder language model of which one block at a time has weights.

    Args:
        checkpoint: its tensors, in the directory of its config.json.
        dtype, device: those of the computation.

    Attributes:
        hands_on: whether blocks hand on to later ones more than hidden states.

    Raises:
        ArchitectureError: the blocks cannot be found or cannot be run alone, or tensors are converted in a way that is not known;
            names the model type.
        CheckpointError: the checkpoint's tensors are not the model's. Both are raised before any weight is read.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._read_again: dict[str, torch.Tensor] = {}  # of the block that is loaded, see stored
        self.model = empty_model(checkpoint.directory, dtype)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # one expert after another, each by its own product
        self.name = self.model.config.model_type
        self.prefix, self.blocks = find_blocks(self.model, self.model.config.get_text_config().num_hidden_layers)
        self.layout = read_layout(self.model, checkpoint)
        self._calls_of_zeros = self._require_blocks_that_run_alone()
        self.hands_on = any(call.handed_on() for call in self._calls_of_zeros)

    @cached_property
    def _tensors(self) -> list[dict[str, ParameterSlice]]:
        return tensors_by_block(self.layout, self.prefix, self.blocks)

    def tensors(self, index: int) -> list[str]:
        """Names in the checkpoint of all tensors of a block."""
        return list(self._tensors[index])

    @cached_property
    def matrices(self) -> list[list[Matrix]]:
        """The matrices in scope of every block; see find_matrices.

        Raises:
            ArchitectureError: see find_matrices.
        """
        return find_matrices(self.model, self.prefix, self._tensors, self._calls_of_zeros)

    def require_reading_orders(self) -> None:
        """Refuse a model whose blocks cannot be pruned layer after layer in one pass; to be called before a block is loaded.

        Raises:
            ArchitectureError: see reading_orders.
        """
        _ = self.reading_orders

    @cached_property
    def reading_orders(self) -> list[ReadingOrder]:
        """How the layers in scope of each block read their inputs; see require_reading_orders."""
        layers = [self.layers(index) for index in range(len(self.blocks))]
        return reading_orders(self.model, self.blocks, layers, self._calls_of_zeros)

    def layers(self, index: int) -> list[Layer]:
        """The layers of a block that multiply by matrices in scope, without repeats."""
        return list(dict.fromkeys(matrix.layer for matrix in self.matrices[index]))

    def require_gradients_by_hidden_states(self, option: str) -> None:
        """Refuse an option that takes gradients from block to block where these hand on more than hidden states.

        Raises:
            ArchitectureError: names the option.
        """
        if self.hands_on:
            reason = f"its blocks hand on more than hidden states, through which {option} takes no gradients, wanted another option"
            raise ArchitectureError(f"{self.name}: {reason}")

    @torch.no_grad()
    def calls(self, windows: torch.Tensor) -> list[Call]:
        """Run the part of the model before the blocks, and record how each block is called; see record_calls.

        Args:
            windows: [windows, tokens], int64.

        Returns:
            One call per block; `hidden` of the first call is the input of the blocks, on the device.

        Raises:
            ArchitectureError: the blocks cannot be run alone; names the block and the argument.
        """
        return record_calls(self.model, self.blocks, windows.to(self.device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the part of the model after the blocks; see run_after_blocks.

        Args:
            hidden: [windows, tokens, width], the last block's output, on the device.

        Returns:
            [windows, tokens, vocabulary], compute dtype.
        """
        return run_after_blocks(self.model, self.blocks, hidden)

    def _require_blocks_that_run_alone(self) -> list[Call]:
        """Record how the blocks are called for two tokens with all weights zero; these zeros take no memory."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = [name for name in self._outside_blocks().values() if name in parameters]
        zeros = {name: torch.zeros((), dtype=parameter_dtype(self.model, name, self.dtype)) for name in names}
        with self._filled((name, zero.expand(parameters[name].shape)) for name, zero in zeros.items()), torch.no_grad():
            try:
                return record_calls(self.model, self.blocks, torch.zeros(1, 2, dtype=torch.int64))
            except ValueError as error:
                if not raised_in(type(self.model).__module__, error):
                    raise
                raise unsupported(self.model, f"it does not run on tokens alone ({error})") from error

    @contextmanager
    def before_blocks(self) -> Iterator[None]:
        """Load all weights outside the blocks, except those of an output embedding that is not tied, while `calls` is needed.

        Embeddings keep their stored dtype; only the rows that are looked up are cast, which gives the same values.
        """
        output = self.model.get_output_embeddings()
        skipped = {id(parameter) for parameter in output.parameters()} if output is not None else set()
        skipped -= {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        needed = {tensor: name for tensor, name in self._outside_blocks().items() if id(parameters.get(name)) not in skipped}
        tables = {f"{name}.weight" for name, module in self.model.named_modules() if type(module) is nn.Embedding}
        with self._filled(self._stored(needed, uncast=tables)):
            yield

    @contextmanager
    def after_blocks(self) -> Iterator[None]:
        """Load all weights outside the blocks, while `logits` is needed."""
        with self._filled(self._stored(self._outside_blocks(), uncast=set())):
            yield

    def _outside_blocks(self) -> dict[str, str]:
        """The tensors outside the blocks: name in the checkpoint -> parameter or buffer, tied parameters under one name."""
        names = {tensor: parameter_slice.name for tensor, parameter_slice in self.layout.items()}
        tied = tied_names(self.model)
        return {tensor: name for tensor, name in names.items() if not name.startswith(f"{self.prefix}.") and name not in tied}

    def _stored(self, names: dict[str, str], uncast: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters and buffers with the values of the checkpoint, on the device, in the compute dtype except for `uncast`."""
        for tensor, name in names.items():
            value = self.checkpoint.tensor(tensor)
            if name not in uncast and value.is_floating_point():
                value = value.to(parameter_dtype(self.model, name, self.dtype))
            yield name, value.to(self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def _filled(self, values: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Set parameters and buffers outside the blocks, and free them at the end."""
        embeddings = [module for module in self.model.modules() if type(module) is nn.Embedding]
        hooks = [module.register_forward_hook(lambda _, __, rows: rows.to(self.dtype)) for module in embeddings]
        names = tied_names(self.model) & {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        try:
            for name, value in values:
                names.add(name)
                put(self.model, name, value)
            self.model.tie_weights()
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in names:
                dematerialize(self.model, name)

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Read a block's tensors as stored, on the host: name in the checkpoint -> tensor. Safe to call in another thread."""
        return {tensor: self.checkpoint.tensor(tensor, pinned=self.device.type == "cuda") for tensor in self._tensors[index]}

    @contextmanager
    def loaded(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
        """Load the weights of one block, and free them at the end.

        Args:
            tensors: from `read`; removed from the dictionary one after another, so that only one is in memory twice.
        """
        block, parameters = self.blocks[index], {}
        for tensor, parameter_slice in self._tensors[index].items():
            name = parameter_slice.name
            if name not in parameters:
                dtype = parameter_dtype(self.model, f"{self.prefix}.{index}.{name}", self.dtype)
                parameters[name] = materialize(block, name, dtype=dtype, device=self.device)
            parameter_slice.of(parameters[name]).copy_(tensors.pop(tensor), non_blocking=True)
        try:
            yield block
        finally:
            for name in parameters:
                dematerialize(block, name)
            self._read_again.clear()

    def stored(self, matrix: Matrix, block: nn.Module) -> torch.Tensor:
        """A matrix of a loaded block with the values of the checkpoint, [rows, columns], float32.

        It is read again if the compute dtype cannot represent all of its values.
        """
        stored = self.checkpoint.dtype(matrix.tensor)
        if self.dtype in (stored, torch.float32):
            return matrix.of(block).float()
        if matrix.expert is None:
            return matrix.stored_in(self.checkpoint.tensor(matrix.tensor)).to(self.device).float()
        if matrix.tensor not in self._read_again:
            self._read_again[matrix.tensor] = self.checkpoint.tensor(matrix.tensor)
        return matrix.stored_in(self._read_again[matrix.tensor]).to(self.device).float()
