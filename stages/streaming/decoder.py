"""A decoder language model whose weights are read and loaded one block at a time."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from stages.checkpoint.layout import ParameterSlice, read_layout, tied_names
from stages.checkpoint.model import dematerialize, empty_model, materialize, parameter_dtype, put
from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError
from stages.streaming.architecture import Layer, Matrix, find_blocks, tensors_by_block, unsupported
from stages.streaming.calls import Call, raised_in, record_calls, run_after_blocks, run_block
from stages.streaming.host_memory import ReservedTensor
from stages.streaming.mixture import Mixture, find_mixture
from stages.streaming.products import zeros_in
from stages.streaming.reading import ReadingOrder, reading_orders
from stages.streaming.scope import find_matrices
from stages.streaming.tokens_alone import idle_models, require_tokens_alone

READERS = 8  # threads that read a block for a GPU: one reads less in a second than the GPU needs
COPIES_OF_LOGITS = 4  # in float32: the dense model's, the pruned one's, their logarithms, intermediate results
TOKENS_AT_ONCE = 256  # whose logits are in memory where weights are trained or gradients are taken


class Decoder:
    """A decoder language model of which one block at a time has weights.

    Args:
        checkpoint: its tensors, in the directory of its config.json.
        dtype, device: those of the computation.

    Attributes:
        layout: name in the checkpoint -> slice of a parameter, without tensors of which transformers computes parameters outside the text
            decoder, see read_layout.
        hands_on: whether blocks hand on to later ones more than hidden states.
        apart: index of a block -> its mixture, whose experts are not loaded with it but one at a time, see take_experts_apart.

    Raises:
        ArchitectureError: the blocks cannot be found or cannot be run alone, or tensors are converted in a way that is not known;
            names the model type.
        CheckpointError: the checkpoint's tensors are not the model's. Both are raised before any weight is read.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.apart: dict[int, Mixture] = {}
        self._reserved: dict[str, ReservedTensor] = {}  # parameter of the loaded block -> memory reserved for its experts
        self.model = empty_model(checkpoint.directory, dtype)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # one expert after another, each by its own product
        self.name = self.model.config.model_type
        self.prefix, self.blocks = find_blocks(self.model)
        layout = read_layout(self.model, checkpoint)
        self.layout = layout.slices
        self._idle: tuple[str, ...] = ()
        self._calls_of_zeros = self._require_blocks_that_run_alone(layout.converted)
        self.hands_on = any(call.handed_on() for call in self._calls_of_zeros)

    @cached_property
    def _tensors(self) -> list[dict[str, ParameterSlice]]:
        return tensors_by_block(self.model, self.layout, self.prefix)

    def tensors(self, index: int) -> list[str]:
        """Names in the checkpoint of all tensors of a block, of which other blocks may have some, too."""
        return list(self._tensors[index])

    @property
    def matrices(self) -> list[list[Matrix]]:
        """The matrices in scope of every block, each in the first block that has it; see find_matrices.

        Raises:
            ArchitectureError: see find_matrices.
        """
        return self._matrices_in_scope[0]

    @property
    def reused(self) -> list[list[Matrix]]:
        """The matrices of earlier blocks that each block has, too, as it holds them; see find_matrices."""
        return self._matrices_in_scope[1]

    @cached_property
    def _matrices_in_scope(self) -> tuple[list[list[Matrix]], list[list[Matrix]]]:
        return find_matrices(self.model, self.prefix, self._tensors, self._calls_of_zeros)

    def require_matrices_of_one_block(self, option: str) -> None:
        """Refuse an option that does not prune a matrix for what several blocks read.

        Raises:
            ArchitectureError: several blocks multiply by a matrix; names the option and the matrix.
        """
        if shared := next((matrix.name for matrices in self.reused for matrix in matrices), None):
            reason = f"several blocks multiply by {shared}, which {option} does not take, wanted another option"
            raise ArchitectureError(f"{self.name}: {reason}")

    def require_reading_orders(self) -> None:
        """Refuse a model whose blocks cannot be pruned layer after layer in one pass; to be called before a block is loaded.

        Raises:
            ArchitectureError: see reading_orders.
        """
        _ = self.reading_orders

    def examples(self) -> Iterator[Call]:
        """Yield the call of each block for a few tokens, on the CPU, as it is if all weights are zero."""
        shared: dict[type, Any] = {}  # mappings into which blocks write what later ones read
        for block, call in zip(self.blocks, self._calls_of_zeros, strict=True):
            example = call.example(shared)
            yield example
            if shared:
                with torch.no_grad(), zeros_in(block):
                    run_block(block, example.hidden, example)

    @cached_property
    def reading_orders(self) -> list[ReadingOrder]:
        """How the layers in scope of each block read their inputs; see require_reading_orders."""
        layers = [self.layers(index) for index in range(len(self.blocks))]
        return reading_orders(self.model, self.blocks, layers, self._calls_of_zeros)

    def layers(self, index: int) -> list[Layer]:
        """The layers of a block that multiply by matrices in scope which no earlier block has, without repeats."""
        return list(dict.fromkeys(matrix.layer for matrix in self.matrices[index]))

    @property
    def has_experts(self) -> bool:
        """Whether any block has experts in one parameter."""
        return any(matrix.parameter_slice.expert is not None for matrices in self.matrices for matrix in matrices)

    def take_experts_apart(self) -> bool:
        """Load the experts of mixtures one at a time from now on, wherever a block allows it; see mixture.py.

        Returns:
            Whether any block does.
        """
        for index, call in enumerate(self._calls_of_zeros):
            mixture = find_mixture(self.blocks[index], self.layers(index), call)
            if mixture is not None:
                self.apart[index] = mixture
        return bool(self.apart)

    def _of_experts(self, index: int, tensor: str) -> bool:
        """Whether a tensor of a block belongs to experts that are not loaded with it."""
        return index in self.apart and self._tensors[index][tensor].name in self.apart[index].parameters

    def tensors_loaded(self, index: int) -> list[str]:
        """Names in the checkpoint of the tensors that are loaded with a block."""
        return [tensor for tensor in self._tensors[index] if not self._of_experts(index, tensor)]

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
        return run_after_blocks(self.model, self.blocks, hidden, streams_first=self._calls_of_zeros[0].streams_first)

    def _require_blocks_that_run_alone(self, converted: list[str]) -> list[Call]:
        """Record how the blocks are called for two tokens with all weights zero; these zeros take no memory.

        Notes, too, which inner models tokens alone do not run, such as vision encoders: their weights are not loaded.

        Args:
            converted: parameters that are not in the layout.
        """
        require_tokens_alone(self.model)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = [name for name in (*self.outside_blocks().values(), *converted) if name in parameters]
        zeros = {name: torch.zeros((), dtype=parameter_dtype(self.model, name, self.dtype)) for name in names}
        with self._filled((name, zero.expand(parameters[name].shape)) for name, zero in zeros.items()), torch.no_grad():
            try:
                with idle_models(self.model, self.prefix) as idle:
                    calls = record_calls(self.model, self.blocks, torch.zeros(1, 2, dtype=torch.int64))
                self._idle = tuple(idle)
                if others := [name for name in converted if not name.startswith(self._idle)]:
                    wanted = "wanted such conversions only in models that tokens alone do not run"
                    raise unsupported(self.model, f"{others[0]} is converted by more than renaming, stacking and joining rows, {wanted}")
                return calls
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
        needed = {tensor: name for tensor, name in self.outside_blocks().items() if id(parameters.get(name)) not in skipped}
        tables = {f"{name}.weight" for name, module in self.model.named_modules() if type(module) is nn.Embedding}
        with self._filled(self._stored(needed, uncast=tables)):
            yield

    @contextmanager
    def after_blocks(self) -> Iterator[None]:
        """Load all weights outside the blocks, while `logits` is needed."""
        with self._filled(self._stored(self.outside_blocks(), uncast=set())):
            yield

    @property
    def head_bytes(self) -> int:
        """About the memory in bytes of the parameters outside the blocks, and of the logits of TOKENS_AT_ONCE tokens."""
        outside = sum(math.prod(self.checkpoint.shape(name)) for name in self.outside_blocks())
        logits = COPIES_OF_LOGITS * 4 * self.model.config.get_text_config().vocab_size * TOKENS_AT_ONCE
        return outside * self.dtype.itemsize + logits

    def outside_blocks(self) -> dict[str, str]:
        """The tensors outside the blocks that tokens alone need: name in the checkpoint -> parameter or buffer, ties under one name."""
        names = {tensor: parameter_slice.name for tensor, parameter_slice in self.layout.items()}
        tied, other = tied_names(self.model), (f"{self.prefix}.", *self._idle)
        return {tensor: name for tensor, name in names.items() if not name.startswith(other) and name not in tied}

    def _stored(self, names: dict[str, str], uncast: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters and buffers with the values of the checkpoint, on the device, in the compute dtype except for `uncast`.

        Parameters of idle models are NaN and take no memory: models ask the first parameter for their device.
        """
        for name, parameter in self.model.named_parameters():
            if name.startswith(self._idle):
                yield name, torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(parameter.shape)
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
        names = self.tensors_loaded(index)
        if self.device.type != "cuda":  # on which the computation has the cores
            return {name: self.checkpoint.tensor(name) for name in names}
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as readers:
            return dict(zip(names, readers.map(partial(self.checkpoint.tensor, pinned=True), names), strict=True))

    def read_expert(self, index: int, expert: int) -> dict[str, torch.Tensor]:
        """Read what belongs to one expert of a block, likewise: name in the checkpoint -> tensor, or its entry for the expert."""
        read = {}
        for tensor, parameter_slice in self._tensors[index].items():
            if self._of_experts(index, tensor) and parameter_slice.expert in (None, expert):
                read[tensor] = self.checkpoint.tensor(tensor, entry=expert if parameter_slice.expert is None else None)
        return read

    @contextmanager
    def loaded(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
        """Load the weights of one block, and free them at the end.

        Args:
            tensors: from `read`; removed from the dictionary one after another, so that only one is in memory twice.
        """
        block, parameters = self.blocks[index], {}
        for tensor in self.tensors_loaded(index):
            parameter_slice = self._tensors[index][tensor]
            name = parameter_slice.name
            if name not in parameters:
                parameters[name] = materialize(block, name, dtype=self._dtype_of(index, name), device=self.device)
            target = parameter_slice.of(parameters[name])  # in three dimensions, where the checkpoint has groups of rows in two
            target.copy_(tensors.pop(tensor).view(target.shape), non_blocking=True)
        if index in self.apart:
            for name in self.apart[index].parameters:
                self._reserved[name] = ReservedTensor(block.get_parameter(name).shape, self._dtype_of(index, name))
                parameters[name] = self._reserved[name].tensor
                put(block, name, parameters[name])
        try:
            yield block
        finally:
            for name in parameters:
                dematerialize(block, name)
            self._reserved.clear()

    def _dtype_of(self, index: int, name: str) -> torch.dtype:
        """The dtype of a block's parameter, by its name in the block."""
        return parameter_dtype(self.model, f"{self.prefix}.{index}.{name}", self.dtype)

    @contextmanager
    def loaded_expert(self, index: int, expert: int, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Load an expert of a block that is loaded without its experts, and free it at the end.

        Args:
            tensors: from `read_expert`.
        """
        for tensor, value in tensors.items():
            parameter_slice = self._tensors[index][tensor]
            of_expert = replace(parameter_slice, expert=expert)
            of_expert.of(self._reserved[parameter_slice.name].tensor).copy_(value)
        tensors.clear()
        try:
            yield
        finally:
            for reserved in self._reserved.values():
                reserved.free(expert)

    def stored(self, matrix: Matrix, block: nn.Module) -> torch.Tensor:
        """A matrix of a loaded block with the values of the checkpoint, [rows, columns], float32.

        It is read again if the compute dtype cannot represent all of its values.
        """
        stored = self.checkpoint.dtype(matrix.tensor)
        if self.dtype in (stored, torch.float32):
            return matrix.of(block).float()
        if len(self.checkpoint.shape(matrix.tensor)) == 2:
            return matrix.stored_in(self.checkpoint.tensor(matrix.tensor)).to(self.device).float()
        weight = self.checkpoint.tensor(matrix.tensor, entry=matrix.expert).to(self.device).float()
        return weight.T if matrix.transposed else weight
