import shutil
import weakref
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.layout import ParameterSlice
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError, PruningError
from stages.pruning import block_loop
from stages.pruning.block_loop import Plan, prune_blocks, relative_error, squared_errors
from stages.pruning.method import Method, prune_matrices, prune_matrix
from stages.pruning.patterns import Nm, Unstructured
from stages.pruning.statistics import SquaredNorm
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import tiny
from tests.methods import MAGNITUDE, WANDA, sparsegpt

CPU = torch.device("cpu")
HALF = Unstructured(sparsity=0.5, comparison_group="row")
SPARSEGPT = sparsegpt()
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))


def run(decoder: Decoder, method, pattern, batch: int = 2, propagate: str = "pruned", windows: torch.Tensor = WINDOWS, held_out: int = 0):
    names = [matrix.name for block in decoder.matrices for matrix in block]
    plan = Plan(method=method, patterns=dict.fromkeys(names, pattern), propagate=propagate, error_tokens=60, expert_tokens=0)
    return list(prune_blocks(stream_of(decoder, windows, batch=batch, held_out=held_out), plan))


def stream_of(decoder: Decoder, windows: torch.Tensor = WINDOWS, **how) -> Stream:
    with decoder.before_blocks():
        return Stream(decoder, windows, **how)


def pruned(base: Checkpoint, method, pattern, batch: int = 2, propagate: str = "pruned", held_out: int = 0):
    blocks = run(Decoder(base, torch.float32, CPU), method, pattern, batch, propagate, held_out=held_out)
    return {name: change for block in blocks for name, change in block.changes.items()}, blocks


def published_wanda(directory, sparsity: float, nm: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """The masks of the published procedure on the whole model, one window at a time (arXiv:2306.11695, algorithm 1)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    received = []
    first = model.model.layers[0].register_forward_pre_hook(lambda m, a, k: received.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None], use_cache=False)
    first.remove()
    hidden, masks = [arguments[0] for arguments, _ in received], {}
    for number, layer in enumerate(model.model.layers):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        norms = {module: torch.zeros(module.in_features) for module in linears.values()}
        seen = dict.fromkeys(norms, 0)

        def watch(module, arguments, norms=norms, seen=seen):
            norms[module] *= seen[module] / (seen[module] + 1)
            seen[module] += 1
            norms[module] += torch.norm(arguments[0][0].T, p=2, dim=1) ** 2 / seen[module]

        hooks = [module.register_forward_pre_hook(watch) for module in linears.values()]
        with torch.no_grad():
            for inputs, (_, keywords) in zip(hidden, received, strict=True):
                layer(inputs, **keywords)
            for hook in hooks:
                hook.remove()
            for name, module in linears.items():
                scores = module.weight.abs() * norms[module].sqrt()
                drop = torch.zeros_like(scores, dtype=torch.bool)
                if nm is None:
                    order = torch.sort(scores, dim=1, stable=True).indices
                    drop.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
                else:
                    for start in range(0, scores.shape[1], nm[1]):
                        lowest = torch.topk(scores[:, start : start + nm[1]], nm[1] - nm[0], dim=1, largest=False).indices
                        drop.scatter_(1, start + lowest, True)
                module.weight[drop] = 0
                masks[f"model.layers.{number}.{name}.weight"] = ~drop
            hidden = [layer(inputs, **keywords) for inputs, (_, keywords) in zip(hidden, received, strict=True)]
    return masks


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_masks_are_those_of_the_published_wanda(base, batch):
    changes, _ = pruned(base, WANDA, Unstructured(sparsity=0.5, comparison_group="row"), batch)
    expected = published_wanda(base.directory, 0.5)
    assert changes.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(changes[name].mask, mask), name


@pytest.mark.parametrize("method", [WANDA, SPARSEGPT])
def test_the_block_loop_prunes_a_matrix_as_anybody_does_with_its_inputs(base, method):
    changes, _ = pruned(base, method, HALF, batch=1)
    model, inputs = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval(), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    alone = prune_matrix(layer.weight.detach(), torch.cat(inputs), method, HALF)
    change = changes["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(change.mask, alone.mask)
    assert (change.values is None) == (alone.values is None)
    if alone.values is not None:
        torch.testing.assert_close(change.values.float(), alone.values[alone.mask].bfloat16().float(), rtol=0.01, atol=1e-4)


def test_masks_of_two_of_four_are_those_of_the_published_wanda(base):
    changes, _ = pruned(base, WANDA, Nm(kept=2, group=4), batch=1)
    for name, mask in published_wanda(base.directory, 0.5, nm=(2, 4)).items():
        assert torch.equal(changes[name].mask, mask), name


@pytest.mark.parametrize("method", [MAGNITUDE, SPARSEGPT])
def test_every_matrix_is_as_sparse_as_asked(base, method):
    changes, _ = pruned(base, method, Unstructured(sparsity=0.25, comparison_group="row"))
    assert len(changes) == 21
    for change in changes.values():
        assert ((~change.mask).sum(dim=1) == change.mask.shape[1] // 4).all()


def test_sparsegpt_changes_kept_weights_and_keeps_the_dtype(base):
    changes, _ = pruned(base, SPARSEGPT, Unstructured(sparsity=0.5, comparison_group="matrix"))
    for name, change in changes.items():
        assert change.values.dtype == base.dtype(name) == torch.bfloat16
        assert not torch.equal(change.values, base.tensor(name)[change.mask])


def test_relative_error_by_hand():
    weight, kept = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert squared_errors(weight, kept, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [16, 25]
    assert relative_error(16, 25) == pytest.approx(4 / 5)
    assert relative_error(0, 0) == 0


def test_errors_are_between_zero_and_one_and_grow_with_sparsity(base):
    def errors(sparsity):
        _, blocks = pruned(base, WANDA, Unstructured(sparsity=sparsity, comparison_group="row"))
        return [matrix.relative_error for block in blocks for matrix in block.matrices]

    low, high = errors(0.25), errors(0.75)
    assert all(0 < a < b < 1 for a, b in zip(low, high, strict=True))


def test_the_relative_error_is_that_of_evenly_spread_tokens_whatever_the_micro_batch(base):
    def errors(batch):
        _, blocks = pruned(base, MAGNITUDE, HALF, batch)
        return [matrix.relative_error for block in blocks for matrix in block.matrices]

    assert errors(1) == pytest.approx(errors(5), rel=1e-4)


METHODS = [WANDA, SPARSEGPT]


@pytest.mark.parametrize("method", METHODS)
def test_a_tall_matrix_is_replaced_some_rows_at_a_time(base, method, monkeypatch):
    whole, expected = pruned(base, method, HALF)
    monkeypatch.setattr(block_loop, "ROWS_AT_ONCE", 7)  # divides no matrix's rows
    found, blocks = pruned(base, method, HALF)
    assert all(torch.equal(found[name].mask, whole[name].mask) for name in whole)
    errors, wanted = ([result.relative_error for block in run for result in block.matrices] for run in (blocks, expected))
    assert errors == pytest.approx(wanted, rel=1e-5)


def subclassed(kind: type[Method], method: Method) -> Method:
    return kind(**{field.name: getattr(method, field.name) for field in fields(method)})


def test_a_statistic_is_freed_before_the_next_is_factored(base, monkeypatch):
    """Gram matrices and their factors are the largest things of a wide layer."""
    alive, most = weakref.WeakSet(), []

    def watched(weights, statistic, method, patterns):
        alive.add(statistic)
        most.append(len(alive))
        return prune_matrices(weights, statistic, method, patterns)

    monkeypatch.setattr(block_loop, "prune_matrices", watched)
    pruned(base, SPARSEGPT, HALF)
    assert most == [1] * 4 * 3  # distinct inputs of three blocks


@pytest.mark.parametrize("method", METHODS)
def test_the_micro_batch_changes_at_most_one_mask_bit_in_two_hundred(base, method):
    """Sums come in another order, so that scores differ in their last bits; ties within a row may then fall otherwise."""
    one, _ = pruned(base, method, HALF, batch=1)
    for batch in (2, 3, 5):
        other, _ = pruned(base, method, HALF, batch)
        bits = sum(change.mask.numel() for change in one.values())
        assert sum(int((one[name].mask != other[name].mask).sum()) for name in one) <= bits / 200


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_gives_the_same_bits(base, method):
    one, _ = pruned(base, method, HALF)
    other, _ = pruned(base, method, HALF)
    for name, change in one.items():
        assert torch.equal(change.mask, other[name].mask)
        assert change.values is None or torch.equal(change.values, other[name].values)


def test_dense_propagation_prunes_every_block_for_the_inputs_of_the_dense_model(base):
    changes, _ = pruned(base, WANDA, HALF, batch=1, propagate="dense")
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    norms, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def watch(module, arguments, name=name):
                norms[name] = norms.get(name, 0) + arguments[0].square().sum(dim=(0, 1))

            hooks.append(module.register_forward_pre_hook(watch))
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None], use_cache=False)
    for name, norm in norms.items():
        expected = HALF.mask(model.get_submodule(name).weight.detach().abs() * norm.sqrt())
        assert int((changes[f"{name}.weight"].mask != expected).sum()) <= 2, name
    exact, _ = pruned(base, WANDA, HALF, batch=1)
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(changes[first].mask, exact[first].mask)
    assert not torch.equal(changes[last].mask, exact[last].mask)


def products(decoder: Decoder, **how: str) -> dict[str, int]:
    """How often each layer of every block was multiplied by, over a whole run."""
    counts: dict[str, int] = {}
    for block in decoder.blocks:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    run(decoder, WANDA, HALF, batch=1, **how)
    return counts


def test_no_product_is_made_whose_output_is_not_read(base):
    """Two passes a block, the first without the last layer (but once, to learn which it is); the last block has but one."""
    exact, windows = products(Decoder(base, torch.float32, CPU)), len(WINDOWS)
    found_scope = found_order = 1  # runs of a block with zeros
    assert exact["self_attn.q_proj"] == 5 * windows + found_scope
    assert exact["mlp.down_proj"] == 2 * windows + 3 + found_scope
    one_pass = products(Decoder(base, torch.float32, CPU), propagate="dense")
    assert one_pass["self_attn.q_proj"] == 3 * windows + found_scope
    assert one_pass["mlp.down_proj"] == 2 * windows + 1 + found_scope
    sequential = products(Decoder(base, torch.float32, CPU), propagate="sequential")
    assert sequential["self_attn.q_proj"] == sequential["mlp.gate_proj"] == 3 * windows + found_scope + found_order
    assert sequential["mlp.down_proj"] == 2 * windows + found_scope + found_order


def test_layers_that_read_the_same_input_share_one_statistic(base):
    made = []

    class Counted(Method):
        @property
        def statistic(self):
            def make(columns, device):
                made.append(columns)
                return SquaredNorm(columns, device)

            return make

    pruned(base, subclassed(Counted, WANDA), HALF)
    assert made == [32, 32, 32, 112] * 3


def test_a_tied_embedding_is_found_and_left_alone(tmp_path):
    directory = tiny.write_checkpoint(tmp_path, tie_word_embeddings=True, shard="10MB")
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    from stages.files import write_json

    names = [name for name in tiny.model(tie_word_embeddings=True).state_dict() if name != "lm_head.weight"]
    write_json(directory / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "one.safetensors")})
    changes, _ = pruned(Checkpoint(directory), WANDA, Unstructured(sparsity=0.5, comparison_group="row"))
    kinds = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert set(changes) == {f"model.layers.{i}.{kind}.weight" for i in range(3) for kind in kinds}


def test_activations_that_are_not_finite_name_the_layer(base):
    class Broken(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            return tensor * 1e38 if name == "model.layers.1.mlp.up_proj.weight" else tensor

    with pytest.raises(PruningError, match=r"layer model.layers.1.mlp.up_proj.weight: found NaN or infinity in its outputs"):
        run(Decoder(Broken(base.directory), torch.float32, CPU), WANDA, HALF)


def test_inputs_that_overflow_in_float16_name_the_layer_and_the_reason(base):
    class Large(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            return tensor * 3e4 if name == "model.layers.1.mlp.up_proj.weight" else tensor

    reason = "found NaN or infinity in its inputs, wanted finite activations; float16 overflows above 65504, bfloat16 does not"
    with pytest.raises(PruningError, match=f"layer model.layers.1.mlp.down_proj.weight: {reason}"):
        run(Decoder(Large(base.directory), torch.float16, CPU), WANDA, HALF)


def test_outputs_that_are_not_finite_name_the_layer(base):
    class Broken(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            return torch.full_like(tensor, 3e38) if name == "model.layers.1.mlp.down_proj.weight" else tensor

    with pytest.raises(PruningError, match="layer model.layers.1.mlp.down_proj.weight: found NaN or infinity in its outputs"):
        run(Decoder(Broken(base.directory), torch.float32, CPU), MAGNITUDE, HALF)


def test_a_layer_that_no_token_reaches_is_named(base):
    decoder = Decoder(base, torch.float32, CPU)
    idle_expert = torch.nn.Linear(32, 8, bias=False, device="meta")
    decoder.blocks[0].self_attn.register_module("idle", torch.nn.ModuleList([idle_expert]))
    decoder.layout["model.layers.0.self_attn.q_proj.weight"] = ParameterSlice(name="model.layers.0.self_attn.idle.0.weight")
    decoder.layout["model.layers.0.self_attn.k_proj.weight"] = ParameterSlice(name="model.layers.0.self_attn.k_proj.weight")
    idle = base.tensor("model.layers.0.self_attn.k_proj.weight")
    decoder.read = lambda index: {name: idle if name.endswith("q_proj.weight") else base.tensor(name) for name in decoder.tensors(index)}
    decoder.blocks[0].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(PruningError, match="layer model.layers.0.self_attn.q_proj.weight: no calibration token reached it"):
        run(decoder, WANDA, HALF, batch=5)


def test_a_shard_that_vanishes_or_is_cut_short_on_the_way_is_named(base, tmp_path):
    copy = Checkpoint(shutil.copytree(base.directory, tmp_path / "copy"))
    decoder = Decoder(copy, torch.float32, CPU)
    name = "model.layers.2.mlp.down_proj.weight"
    shard = copy.directory / copy.shard_of[name]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=f"shard .*{shard.name}: found .* bytes of .*, wanted .*: it is truncated"):
        run(decoder, WANDA, HALF)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard .*{shard.name}: No such file or directory; was it there a moment ago"):
        run(decoder, WANDA, HALF)
