"""The matrices of a decoder language model that are in scope: what tokens are multiplied with in its blocks, without routers.

Linear layers and experts are known by their modules. Of other parameters a run of the block with zeros shows whether tokens are multiplied
with them. Filters of convolutions, decays of recurrences, norms and biases are not in scope, nor are linear layers that such a run never
calls, as the attention to an encoder that is not there; experts, which a router may pass over, are. The same are in scope in any dtype.
"""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from stages.checkpoint.layout import ParameterSlice, tied_names
from stages.streaming.architecture import Matrix, is_linear, kind_of_block, unsupported
from stages.streaming.calls import Call, run_block
from stages.streaming.products import Use, multiplied_parameters
from stages.streaming.routers import find_routers

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel


def find_matrices(
    model: "PreTrainedModel", prefix: str, tensors: list[dict[str, ParameterSlice]], calls: list[Call]
) -> tuple[list[list[Matrix]], list[list[Matrix]]]:
    """Find the matrices in scope of every block: all that tokens are multiplied with, experts included, without routers.

    Args:
        prefix: path of the blocks in the model. tensors: those of each block, see tensors_by_block.
        calls: one for each block, of a few tokens, on the CPU.

    Returns:
        For each block: its matrices that no earlier block has; and those of earlier blocks, as it holds them.

    Raises:
        ArchitectureError: a block has no matrices, or a matrix is tied to a tensor outside the blocks or stored twice, or has groups of
            rows that are not as large, or a tensor holds experts that other parameters lack; names the block, the tensor or the module.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    in_blocks = Counter(tensor for of_block in tensors for tensor in of_block)
    tied, matrices, reused, first_in, scopes = tied_names(model), [], [], dict[str, int](), _Scopes()
    shared: dict[type, Any] = {}  # mappings into which blocks write what later ones read, so that all of them must run
    for index, of_block in enumerate(tensors):
        path = f"{prefix}.{index}"
        block, matrices_of_block, of_earlier = model.get_submodule(path), list[Matrix](), list[Matrix]()
        trial = calls[index].example(deepcopy(shared))
        call = calls[index].example(shared)
        try:
            scope = scopes.of(block, call, trial, run_again=bool(shared))
        except ValueError as error:
            raise unsupported(model, str(error)) from error
        complete = _complete_experts(block, scope)
        for tensor, parameter_slice in of_block.items():
            if parameter_slice.name not in scope:
                continue
            use = scope[parameter_slice.name]
            stored_twice = in_blocks[tensor] == 1 and f"{path}.{parameter_slice.name}" in tied
            if stored_twice or uses[id(block.get_parameter(parameter_slice.name))] > in_blocks[tensor]:
                raise unsupported(model, f"{tensor} is tied to another tensor, wanted matrices of the blocks alone, each stored once")
            if use.groups > 1:  # after the check: it makes a parameter of its own
                _unfold(model, block, tensor, parameter_slice.name, use.groups)
            own = first_in.setdefault(tensor, index) == index
            (matrices_of_block if own else of_earlier).extend(_matrices(model, block, tensor, parameter_slice, use, complete))
        if not (matrices_of_block or of_earlier):
            raise unsupported(model, f"block {index} has no linear layers to prune")
        matrices.append(matrices_of_block)
        reused.append(of_earlier)
    return matrices, reused


def _unfold(model: "PreTrainedModel", block: nn.Module, tensor: str, name: str, groups: int) -> None:
    """Let a parameter whose groups of rows have inputs of their own be [groups, rows, columns], as one that holds experts.

    Raises:
        ArchitectureError: its rows are no such groups; names the tensor.
    """
    path, _, leaf = name.rpartition(".")
    parameter = block.get_parameter(name)
    if len(parameter) % groups:
        raise unsupported(model, f"{tensor} has {len(parameter)} rows in {groups} groups, wanted as many in each")
    unfolded = nn.Parameter(parameter.unflatten(0, (groups, -1)), requires_grad=False)
    block.get_submodule(path)._parameters[leaf] = unfolded


def _complete_experts(block: nn.Module, scope: dict[str, Use]) -> dict[str, int]:
    """The number of experts of each module that holds any: those in all of its parameters.

    LongCat's experts without weights, which hand tokens on, have rows in one parameter that no token is ever multiplied with.
    """
    counts: dict[str, int] = {}
    for name in scope:
        parameter, path = block.get_parameter(name), name.rpartition(".")[0]
        if parameter.dim() == 3:
            counts[path] = min(len(parameter), counts.get(path, len(parameter)))
    return counts


class _Scopes:
    """The parameters in scope of blocks; blocks of the same modules and shapes have the same."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, Use]] = {}

    def of(self, block: nn.Module, call: Call, trial: Call, *, run_again: bool) -> dict[str, Use]:
        """Name of each parameter of a block that is in scope -> how tokens are multiplied with it.

        Args:
            call, trial: see _scope. run_again: though a block with the same modules and shapes has been.
        """
        kind = kind_of_block(block)
        if kind not in self._known or run_again:
            self._known[kind] = _scope(block, call, trial)
        return self._known[kind]


def _scope(block: nn.Module, call: Call, trial: Call) -> dict[str, Use]:
    """Weights of linear layers that are called, of experts, and else what a run with zeros shows; without routers.

    Args:
        call: what it leaves in mappings that blocks share is for later blocks. trial: the same, with copies of these.
    """
    from transformers.pytorch_utils import Conv1D

    multiplied = multiplied_parameters(block, partial(run_block, hidden=call.hidden, call=call))
    known, others = dict[str, Use](), list[str]()
    for name, parameter in block.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        module = block.get_submodule(path)
        if parameter.dim() == 2 and leaf == "weight" and is_linear(module):
            if name not in multiplied and not _is_one_of_several(block, path):
                continue
            groups = multiplied[name].groups if name in multiplied else 1
            known[name] = Use(transposed=isinstance(module, Conv1D), called=True, groups=groups)
        elif parameter.dim() == 3 and getattr(module, "is_transposed", None) is False:
            known[name] = Use(transposed=False)
        elif parameter.dim() in (2, 3):
            others.append(name)
    not_called = [name for name, use in multiplied.items() if not use.called]
    known |= {name: multiplied[name] for name in not_called if name in known or name in others}
    owners = {name.rpartition(".")[0] for name in known if block.get_parameter(name).dim() == 3}
    known = {name: use for name, use in known.items() if not _is_called_router(name) and not _gates_shared_expert(block, name, owners)}
    candidates = [name for name in known if name in multiplied and block.get_parameter(name).dim() == 2]
    routers = find_routers(block, candidates, owners, partial(run_block, hidden=trial.hidden, call=trial))
    return {name: use for name, use in known.items() if name not in routers}


def _is_one_of_several(block: nn.Module, path: str) -> bool:
    """Whether a module is in a list of modules, as experts are that a router may pass over."""
    while path:
        path = path.rpartition(".")[0]
        if isinstance(block.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
            return True
    return False


def _matrices(
    model: "PreTrainedModel", block: nn.Module, tensor: str, parameter_slice: ParameterSlice, use: Use, complete: dict[str, int]
) -> list[Matrix]:
    """List the matrices of a tensor: one, or one for each expert, or group of rows, of a tensor that holds several; none of no expert's.

    Args:
        complete: see _complete_experts.

    Raises:
        ArchitectureError: the tensor holds experts of which some are not complete; names it.
    """
    parameter = block.get_parameter(parameter_slice.name)
    several = parameter.dim() == 3 and parameter_slice.expert is None
    experts = complete.get(parameter_slice.name.rpartition(".")[0], len(parameter))
    if several and len(parameter) != experts:
        raise unsupported(model, f"{tensor} holds {len(parameter)} experts, of which {experts} are in all parameters, wanted all of them")
    if parameter_slice.expert is not None and parameter_slice.expert >= experts:
        return []
    transposed = use.transposed != parameter_slice.transposed
    matrices = []
    for expert in range(len(parameter)) if several else [None]:
        of_matrix = replace(parameter_slice, expert=expert) if several else parameter_slice
        rows, columns = reversed(of_matrix.of(parameter).shape) if transposed else of_matrix.of(parameter).shape
        matrix = Matrix(
            tensor=tensor,
            expert=expert,
            parameter_slice=of_matrix,
            transposed=transposed,
            shape=(rows, columns),
            called=use.groups == 1 and (use.called or parameter.dim() == 3),
        )
        matrices.append(matrix)
    return matrices


def _is_called_router(name: str) -> bool:
    """Whether a parameter belongs to a module that is called a router: experts of other interfaces do not show what decides on them."""
    return "router" in name.rpartition(".")[0]


def _gates_shared_expert(block: nn.Module, name: str, owners: set[str]) -> bool:
    """Whether a parameter has one output, by which a shared expert is scaled: in the parent of a module that holds a mixture's experts.

    Args:
        owners: paths of the modules that hold experts.
    """
    parents = [owner.rpartition(".")[0] for owner in owners if owner != name.rpartition(".")[0]]
    in_parent = any(name.startswith(f"{parent}." if parent else "") for parent in parents)
    return in_parent and block.get_parameter(name).dim() == 2 and len(block.get_parameter(name)) == 1
