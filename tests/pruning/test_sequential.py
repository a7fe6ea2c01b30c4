"""Layer after layer in one pass, against a plain order on a whole model that runs anew for every layer."""

import gc
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, PruningError
from stages.pruning import sequential, turns
from stages.pruning.activations import Activations
from stages.pruning.block_loop import Plan, PrunedBlock, prune_blocks
from stages.pruning.method import prune_matrices
from stages.pruning.patterns import Nm, Unstructured
from stages.pruning.reconstruction import Reconstruction
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import Stream
from tests.methods import WANDA, made, sparsegpt
from tests.pruning.test_architectures import fetched, inputs_of, mask_of

CPU = torch.device("cpu")
HALF = Unstructured(sparsity=0.5, comparison_group="row")
WINDOWS = torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(0))
SPARSEGPT = sparsegpt()
# attention and MLP one after the other; side by side, on one input and on two; transposed; Mamba; hybrids, one after the other and side by
# side; a recurrence with state; what goes from block to block; experts one by one, all in one product, of attention, beside a shared one
KINDS = [
    "llama",
    "phi",
    "cohere",
    "gpt_neox",
    "gpt2",
    "mamba",
    "jamba",
    "falcon_h1",
    "recurrent_gemma",
    "gemma4_text",
    "mixtral",
    "llama4_text",
    "jetmoe",
    "qwen2_moe",
    "deepseek_v3",
    "qwen3_next",
]


def pruned(base: Checkpoint, method=WANDA, pattern=HALF, batch: int = 2, windows=WINDOWS, held_out: int = 0, memory=None, **how):
    """The decoder, its pruned blocks, and the stream behind the last but one."""
    decoder = Decoder(base, torch.float32, CPU)
    names = [matrix.name for block in decoder.matrices for matrix in block]
    defaults = {"patterns": dict.fromkeys(names, pattern), "propagate": "sequential", "error_tokens": 60, "expert_tokens": 0}
    with decoder.before_blocks():
        stream = Stream(decoder, windows, batch=batch, held_out=held_out, memory=memory)
    return decoder, list(prune_blocks(stream, Plan(method=method, **{**defaults, **how}))), stream


def masks_of(decoder: Decoder, blocks: list[PrunedBlock]) -> dict[str, torch.Tensor]:
    changes = {name: change for block in blocks for name, change in block.changes.items()}
    return {matrix.name: mask_of(changes, matrix) for block in decoder.matrices for matrix in block}


def eager(directory) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def plain(decoder: Decoder, method, batch: int = 2, windows=WINDOWS, last: str = "") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """True sequential order: prune the next layer that the model calls for what it reads, then run the whole model again.

    last: in the name of the layer that comes last in a block whatever the first micro-batch calls.
    """
    model = eager(decoder.checkpoint.directory)
    parameters, masks = dict(model.named_parameters()), dict[str, torch.Tensor]()
    for index, matrices in enumerate(decoder.matrices):
        of_layer: dict = {}
        for matrix in matrices:
            name = f"{decoder.prefix}.{index}.{matrix.parameter_slice.name}"
            of_layer.setdefault((name, matrix.parameter_slice.expert), []).append(matrix)
        names = {name for name, _ in of_layer}
        while of_layer:
            with inputs_of(model, {name: parameters[name] for name in names}) as seen:
                for start in range(0, len(windows), batch):
                    model(windows[start : start + batch], use_cache=False)
            layers = [layer for layer in seen if layer in of_layer]  # in the order of the calls
            layer = next((layer for layer in layers if not last or last not in layer[0]), layers[0])
            tokens = seen[layer]
            for matrix in of_layer.pop(layer):
                weight = matrix.parameter_slice.of(parameters[layer[0]])
                weight = weight.T if matrix.transposed else weight
                if method.statistic is WANDA.statistic:
                    norm = sum(
                        piece.reshape(-1, windows.shape[1] if layer[1] is None else max(1, piece.shape[1]), piece.shape[-1])
                        .square()
                        .sum(dim=(0, 1))
                        for piece in tokens
                    )
                    order = torch.sort(weight.abs() * norm.sqrt(), dim=1, stable=True).indices
                    masks[matrix.name] = torch.ones(weight.shape, dtype=torch.bool).scatter_(1, order[:, : weight.shape[1] // 2], False)
                    weight[~masks[matrix.name]] = 0
                else:
                    statistic = method.statistic(weight.shape[1], CPU)
                    for piece in tokens:
                        statistic.add(piece)
                    statistic.finish()
                    (alone,) = prune_matrices([weight], statistic, method, [HALF])
                    masks[matrix.name] = alone.mask
                    weight.copy_(alone.values.to(decoder.checkpoint.dtype(matrix.tensor)).masked_fill(~alone.mask, 0))
    return model, masks


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_hidden_states_are_those_of_the_plain_order(kind, tmp_path):
    decoder, blocks, stream = pruned(fetched(kind, tmp_path))
    model, expected = plain(decoder, WANDA)
    masks = masks_of(decoder, blocks)
    assert masks.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(masks[name], mask), name
        assert ((~mask).sum(dim=1) == mask.shape[1] // 2).all()
    received = []
    model.get_submodule(decoder.prefix)[-1].register_forward_pre_hook(
        lambda _, arguments, __: received.append(arguments[0]), with_kwargs=True
    )
    with torch.no_grad():
        for start in range(0, len(WINDOWS), 2):
            model(WINDOWS[start : start + 2], use_cache=False)
    torch.testing.assert_close(stream.hidden, torch.cat(received), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "mamba"])
def test_the_micro_batch_is_that_of_the_plain_order(kind, batch, tmp_path):
    decoder, blocks, _ = pruned(fetched(kind, tmp_path), batch=batch)
    masks, (_, expected) = masks_of(decoder, blocks), plain(decoder, WANDA, batch)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def differing(masks: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The fraction of bits."""
    return sum(int((masks[name] != mask).sum()) for name, mask in expected.items()) / sum(mask.numel() for mask in expected.values())


@pytest.mark.parametrize("kind", ["llama", "phi", "mixtral", "jamba"])
def test_sparsegpt_is_that_of_the_plain_order_but_for_one_bit_in_two_hundred(kind, tmp_path):
    """Gram matrices are added up in another order."""
    decoder, blocks, stream = pruned(fetched(kind, tmp_path), SPARSEGPT)
    model, expected = plain(decoder, SPARSEGPT)
    masks = masks_of(decoder, blocks)
    assert differing(masks, expected) <= 1 / 200
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {name: int(mask.sum()) for name, mask in expected.items()}
    received = []
    model.get_submodule(decoder.prefix)[-1].register_forward_pre_hook(
        lambda _, arguments, __: received.append(arguments[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    lost = (stream.hidden - received[0]).norm() / received[0].norm()
    assert lost < 0.02


def test_it_is_not_the_published_order(tmp_path):
    base = fetched("llama", tmp_path)
    decoder, blocks, _ = pruned(base)
    _, published, _ = pruned(base, propagate="pruned")
    masks, others = masks_of(decoder, blocks), masks_of(decoder, published)
    same = {
        name.removeprefix("model.layers.0.") for name, mask in masks.items() if ".layers.0." in name and torch.equal(mask, others[name])
    }
    assert same == {f"self_attn.{kind}_proj.weight" for kind in "qkv"}  # before which nothing is pruned


@pytest.mark.parametrize("method", [WANDA, SPARSEGPT])
def test_the_same_run_gives_the_same_bits_in_memory_and_in_files(method, tmp_path, monkeypatch):
    base, moves, kept = fetched("mixtral", tmp_path), [], Activations.move_to_buffer

    def counted(activations, allocate):
        before = activations.bytes()
        kept(activations, allocate)
        moves.append(before - activations.bytes())

    monkeypatch.setattr(Activations, "move_to_buffer", counted)
    decoder, blocks, stream = pruned(base, method, held_out=1)
    for budget in (0, 30_000, 2**30):
        moves.clear()
        with_bound = pruned(base, method, held_out=1, memory=HostMemory(stream.hidden.nbytes + budget, tmp_path))
        assert (len(moves) > 0) == (budget < 2**30)
        assert all(saved > 0 for saved in moves)
        for block, other in zip(blocks, with_bound[1], strict=True):
            for name, change in block.changes.items():
                assert torch.equal(change.mask, other.changes[name].mask)
                assert change.values is None or torch.equal(change.values, other.changes[name].values)
            assert [one.relative_error for one in block.matrices] == [one.relative_error for one in other.matrices]
            assert [one.held_out_error for one in block.matrices] == [one.held_out_error for one in other.matrices]
        assert torch.equal(stream.hidden, with_bound[2].hidden)


def test_what_a_block_moved_is_freed_with_it(tmp_path):
    """Not when Python next looks for cycles: page-locked memory of many blocks would fill a machine until then."""
    base, buffers = fetched("llama", tmp_path), []

    class Watched(HostMemory):
        def in_file(self, shape, dtype):
            buffer = super().in_file(shape, dtype)
            buffers.append(weakref.ref(buffer))
            return buffer

    gc.collect()
    gc.disable()
    try:
        _, _, stream = pruned(base, memory=Watched(0, tmp_path))
        assert len(buffers) > 1  # the first holds the hidden states
        assert [buffer() for buffer in buffers if buffer() is not None] == [stream.hidden]
    finally:
        gc.enable()


def test_what_waits_is_at_most_the_budget_and_one_micro_batch(tmp_path, monkeypatch):
    base, most, resume = fetched("llama", tmp_path), [], sequential.SequentialPass._resume

    def watched(self, of_micro_batch):
        resume(self, of_micro_batch)
        most.append(sum(one.activations.bytes() for one in self.passes if not one.turns.ended))

    monkeypatch.setattr(sequential.SequentialPass, "_resume", watched)
    hidden = WINDOWS.numel() * 32 * 4
    pruned(base, batch=1, memory=HostMemory(2**30, tmp_path))
    unbounded = max(most)
    most.clear()
    pruned(base, batch=1, memory=HostMemory(hidden + unbounded // 2, tmp_path))
    assert unbounded / 4 < max(most) <= unbounded / 2


def test_an_expert_that_few_tokens_chose_is_calibrated_on_all_tokens_that_reached_its_mixture(tmp_path):
    decoder, blocks, _ = pruned(fetched("mixtral", tmp_path), expert_tokens=10**6)
    experts = [one for one in blocks[0].matrices if one.matrix.expert is not None or one.matrix.parameter_slice.expert is not None]
    assert {one.calibrated_on for one in experts} == {"all tokens"}
    assert sum(one.tokens for one in experts) == 2 * 3 * WINDOWS.numel()
    model, entered = eager(decoder.checkpoint.directory), []
    masks = masks_of(decoder, blocks)
    with torch.no_grad():
        for matrix in decoder.matrices[0]:  # attention as it is when the mixture is reached
            if matrix.parameter_slice.expert is None:
                model.get_parameter(f"model.layers.0.{matrix.parameter_slice.name}").mul_(masks[matrix.name])
        module = model.model.layers[0].mlp.experts
        module.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
        for start in range(0, len(WINDOWS), 2):
            model(WINDOWS[start : start + 2], use_cache=False)
        tokens = torch.cat(entered)
        for expert in range(4):
            gate, up, down = (f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2"))
            norm = tokens.square().sum(dim=0).sqrt()
            weights = {name: decoder.checkpoint.tensor(name).float() for name in (gate, up, down)}
            assert all(torch.equal(masks[name], HALF.mask(weights[name].abs() * norm)) for name in (gate, up))
            between = module.act_fn(tokens @ (weights[gate] * masks[gate]).T) * (tokens @ (weights[up] * masks[up]).T)
            expected = HALF.mask(weights[down].abs() * between.square().sum(dim=0).sqrt())
            assert (masks[down] != expected).sum() <= masks[down].numel() / 200


@pytest.mark.parametrize("method", [WANDA, SPARSEGPT])
@pytest.mark.parametrize("kind", ["mixtral", "llama4_text", "jetmoe"])
def test_an_expert_that_no_token_chose_is_pruned_all_the_same(kind, method, tmp_path):
    _, blocks, _ = pruned(fetched(kind, tmp_path), method, batch=1, windows=WINDOWS[:1, :2])
    unseen = [one for block in blocks for one in block.matrices if one.tokens == 0]
    assert unseen
    assert {one.calibrated_on for one in unseen} == {"all tokens"}
    assert all(one.relative_error > 0 for one in unseen)


def experts_in(order) -> object:
    """Mixtral's experts, called in an order of one's own."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in order(hidden_states, top_k_index.unique().tolist()):
            where, slot = (top_k_index == expert).nonzero(as_tuple=True)
            between = self._apply_gate(nn.functional.linear(hidden_states[where], self.gate_up_proj[expert]))
            own = nn.functional.linear(between, self.down_proj[expert]) * top_k_weights[where, slot, None]
            output.index_add_(0, where, own)
        return output

    return forward


def test_experts_may_be_called_in_another_order(tmp_path, monkeypatch):
    base = fetched("mixtral", tmp_path)
    decoder, expected, _ = pruned(base, batch=1)
    monkeypatch.setattr(MixtralExperts, "forward", experts_in(lambda _, chosen: sorted(chosen, reverse=True)))
    assert differing(masks_of(decoder, pruned(base, batch=1)[1]), masks_of(decoder, expected)) <= 1 / 200


def test_experts_that_micro_batches_call_in_different_orders_are_refused_by_name(tmp_path, monkeypatch):
    base = fetched("mixtral", tmp_path)
    descending = experts_in(lambda tokens, chosen: sorted(chosen, reverse=bool(tokens.sum() > 0)))
    monkeypatch.setattr(MixtralExperts, "forward", descending)
    wanted = (
        r"layer mlp.experts.gate_up_proj\[\d\]: it is called by one micro-batch after others have gone on without it, wanted one .* order"
    )
    with pytest.raises(PruningError, match=wanted):
        pruned(base, batch=1)


def skipping(skips) -> object:
    """An MLP whose gate, or all of which, some micro-batches do not call."""

    def forward(self, x):
        skipped = skips(x)
        if skipped == "all":
            return torch.zeros_like(x)
        gate = torch.ones(()) if skipped == "gate" else self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x * 2))

    return forward


@pytest.mark.parametrize("what", ["gate", "all"])
def test_a_layer_that_some_micro_batches_do_not_call_keeps_none_of_them_waiting(what, base, monkeypatch):
    monkeypatch.setattr(MistralMLP, "forward", skipping(lambda x: what if x[0, 0, 0] > 0 else None))
    windows = torch.randint(3, 400, (6, 20), generator=torch.Generator().manual_seed(0))
    decoder, blocks, _ = pruned(base, batch=1, windows=windows)
    fewer = [one.tokens for block in blocks for one in block.matrices if one.matrix.name.endswith("gate_proj.weight")]
    assert all(0 < tokens < windows.numel() for tokens in fewer)
    masks, (_, expected) = masks_of(decoder, blocks), plain(decoder, WANDA, 1, windows, last="down_proj")
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def test_a_layer_that_reads_two_inputs_is_refused_before_a_weight_is_read(base, monkeypatch):
    def twice(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + self.down_proj(self.up_proj(x))

    monkeypatch.setattr(MistralMLP, "forward", twice)
    monkeypatch.setattr(Checkpoint, "tensor", None)
    reason = "mistral: layer mlp.down_proj.weight of block 0 reads two inputs in one call of its block, .* prune=exact takes both"
    with pytest.raises(ArchitectureError, match=reason):
        Decoder(base, torch.float32, CPU).require_reading_orders()


def test_a_block_that_writes_into_a_container_of_its_own_is_refused_before_a_weight_is_read(base, monkeypatch):
    def noting(self, x):
        self.config.__dict__.setdefault("unused", 0)
        self.sums[len(self.sums)] = float(x.sum())
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(MistralMLP, "forward", noting)
    monkeypatch.setattr(Checkpoint, "tensor", None)
    decoder = Decoder(base, torch.float32, CPU)
    for block in decoder.blocks:
        block.mlp.sums = {}
    with pytest.raises(
        ArchitectureError, match="mistral: block 0 writes into mlp.sums while it runs, .* prune=exact runs one micro-batch after"
    ):
        decoder.require_reading_orders()


LEARNING = {"reconstruction": Reconstruction(epochs=1, learning_rate=0.01, search=False)}


@pytest.mark.parametrize("more", [LEARNING, {"permutation_rounds": 4}, {"permutation_rounds": 4, **LEARNING}], ids=str)
def test_a_block_that_changes_after_its_pass_hands_on_what_it_is_then(base, more):
    decoder, blocks, stream = pruned(base, sparsegpt(), Nm(kept=2, group=4), held_out=1, **more)
    assert any(change.columns is not None for block in blocks for change in block.changes.values()) == ("permutation_rounds" in more)
    model = eager(base.directory)
    with torch.no_grad():
        for block in blocks:
            for name, change in block.changes.items():
                assert (change.mask.view(-1, 4).sum(dim=1) == 2).all()
                model.get_parameter(name).copy_(change.apply(base.tensor(name)))
        states = model.model(WINDOWS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[2], stream.hidden, rtol=1e-3, atol=1e-4)
    assert all((block.training is not None) == ("reconstruction" in more) for block in blocks)


@pytest.mark.parametrize("update", ["swaps", "dsnot"])
def test_updates_that_are_judged_by_windows_held_out_have_them(update, base):
    how = {"swaps": {"cycles": 3, "candidates": 4, "refit_steps": 0}, "dsnot": {"cycles": 5, "threshold": 0.1}}[update]
    decoder, blocks, _ = pruned(base, made("wanda", update, **how), held_out=2)
    results = [one for block in blocks for one in block.matrices]
    assert all(one.held_out_error is not None for one in results)
    assert {one.refined for one in results} <= ({True, False} if update == "swaps" else {None, True, False})
    assert all(((~mask).sum(dim=1) == mask.shape[1] // 2).all() for mask in masks_of(decoder, blocks).values())


def test_an_error_in_a_pass_is_raised_and_leaves_no_thread_at_work(base, monkeypatch):
    monkeypatch.setattr(MistralMLP, "forward", skipping(lambda x: 1 / 0 if x[0, 0, 0] > 0 else None))
    with pytest.raises(ZeroDivisionError):
        pruned(base, batch=1)
    deadline = time.monotonic() + 10
    while (threads := [thread.name for thread in threading.enumerate()].count(turns.NAME)) > len(turns._Worker.idle):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert threads > 0


def test_a_pass_knows_which_inputs_it_may_still_read():
    ended = SimpleNamespace(ended=False)
    of_module = sequential._Pass(slice(0, 1), False, None, None)
    of_module.turns = ended
    layer = SimpleNamespace(expert=2)
    routed, linear = sequential._DistinctInput(0, [layer], "experts"), sequential._DistinctInput(1, [SimpleNamespace(expert=None)], None)
    assert of_module.will_read(routed)
    assert of_module.will_read(linear)
    of_module.chosen["experts"] = {1, 3}
    assert not of_module.will_read(routed)
    assert replace(of_module, chosen={"experts": {2}}) is not of_module
    of_module.read[1] = None
    assert not of_module.will_read(linear)
