import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.reader import Checkpoint
from stages.errors import PruningError
from stages.pruning.architecture import Decoder
from stages.pruning.block_loop import prune_blocks, relative_error, same
from stages.pruning.method import ScoreAndSelect, SparseGpt
from stages.pruning.patterns import Nm, Unstructured
from tests import tiny

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))


def pruned(base: Checkpoint, method, pattern, batch: int = 2):
    decoder = Decoder(base, torch.float32, CPU)
    names = [name for index in range(len(decoder.blocks)) for name in decoder.matrices(index).values()]
    blocks = list(prune_blocks(decoder, WINDOWS, method, dict.fromkeys(names, pattern), batch=batch, error_tokens=60))
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
    changes, _ = pruned(base, ScoreAndSelect(score="wanda"), Unstructured(sparsity=0.5, threshold="row"), batch)
    expected = published_wanda(base.directory, 0.5)
    assert changes.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(changes[name].mask, mask), name


def test_masks_of_two_of_four_are_those_of_the_published_wanda(base):
    changes, _ = pruned(base, ScoreAndSelect(score="wanda"), Nm(kept=2, group=4), batch=1)
    for name, mask in published_wanda(base.directory, 0.5, nm=(2, 4)).items():
        assert torch.equal(changes[name].mask, mask), name


@pytest.mark.parametrize("method", [ScoreAndSelect(score="magnitude"), SparseGpt(score="obs", damping=0.01, block_size=16)])
def test_every_matrix_is_as_sparse_as_asked(base, method):
    changes, _ = pruned(base, method, Unstructured(sparsity=0.25, threshold="row"))
    assert len(changes) == 21
    for change in changes.values():
        assert ((~change.mask).sum(dim=1) == change.mask.shape[1] // 4).all()


def test_sparsegpt_moves_survivors_and_keeps_the_dtype(base):
    changes, _ = pruned(base, SparseGpt(score="obs", damping=0.01, block_size=16), Unstructured(sparsity=0.5, threshold="matrix"))
    for name, change in changes.items():
        assert change.values.dtype == base.dtype(name) == torch.bfloat16
        assert not torch.equal(change.values, base.tensor(name)[change.mask])


def test_relative_error_by_hand():
    weight, kept = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert relative_error(weight, kept, torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(4 / 5)


def test_errors_are_between_zero_and_one_and_grow_with_sparsity(base):
    def errors(sparsity):
        _, blocks = pruned(base, ScoreAndSelect(score="wanda"), Unstructured(sparsity=sparsity, threshold="row"))
        return [error for block in blocks for error in block.errors.values()]

    low, high = errors(0.25), errors(0.75)
    assert all(0 < a < b < 1 for a, b in zip(low, high, strict=True))


def test_only_one_block_has_weights_at_a_time(base):
    decoder = Decoder(base, torch.float32, CPU)
    with decoder.loaded(1):
        real = {name for name, parameter in decoder.model.named_parameters() if not parameter.is_meta}
    assert real == set(decoder.tensor_names(1).values())
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_a_tied_embedding_is_found_and_left_alone(tmp_path):
    directory = tiny.write_checkpoint(tmp_path, tie_word_embeddings=True, shard="10MB")
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    from stages.files import write_json

    names = [name for name in tiny.model(tie_word_embeddings=True).state_dict() if name != "lm_head.weight"]
    write_json(directory / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "one.safetensors")})
    changes, _ = pruned(Checkpoint(directory), ScoreAndSelect(score="wanda"), Unstructured(sparsity=0.5, threshold="row"))
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


def test_an_architecture_whose_tensors_have_other_names_is_refused(tmp_path, base):
    renamed = Checkpoint(base.directory)
    renamed.shard_of = {name.replace("self_attn", "attention"): shard for name, shard in renamed.shard_of.items()}
    with pytest.raises(
        PruningError, match="mistral: .* does not fit MistralForCausalLM: it has no tensor model.layers.0.self_attn.* not supported"
    ):
        Decoder(renamed, torch.float32, CPU)


def test_activations_that_are_not_finite_name_the_layer(base):
    class Broken(Checkpoint):
        def tensor(self, name):
            tensor = super().tensor(name)
            return tensor * 1e38 if name == "model.layers.1.mlp.up_proj.weight" else tensor

    decoder = Decoder(Broken(base.directory), torch.float32, CPU)
    names = [name for index in range(3) for name in decoder.matrices(index).values()]
    patterns = dict.fromkeys(names, Unstructured(sparsity=0.5, threshold="row"))
    with pytest.raises(PruningError, match=r"layer model.layers.1.mlp.down_proj.weight: found a score that is NaN or infinite"):
        list(prune_blocks(decoder, WINDOWS, ScoreAndSelect(score="wanda"), patterns, batch=5, error_tokens=60))


def test_weights_that_are_no_linear_layers_stop_the_pruning_by_name(base):
    decoder = Decoder(base, torch.float32, CPU)
    decoder.blocks[1].mlp.register_parameter("experts", torch.nn.Parameter(torch.empty(4, 8, 8, device="meta")))
    base.shard_of |= {"model.layers.1.mlp.experts": "x"}
    base.headers |= {"x": {"model.layers.1.mlp.experts": {"shape": [4, 8, 8]}}}
    with pytest.raises(PruningError, match=r"mistral: mlp.experts of shape \[4, 8, 8\] is no linear layer's weight"):
        decoder._require_same_names()


def test_blocks_that_are_not_one_list_stop_the_pruning_by_name(base):
    decoder = Decoder(base, torch.float32, CPU)
    with pytest.raises(PruningError, match="mistral: found 0 lists of 99 modules, wanted one list of decoder blocks"):
        decoder._find_blocks(99)


def test_arguments_are_compared_bit_by_bit():
    one, other = torch.tensor([1.0]), torch.tensor([2.0])
    assert same({"a": (one, None, 3)}, {"a": (one.clone(), None, 3)})
    assert not same({"a": (one,)}, {"a": (other,)})
    assert not same({"a": one}, {"b": one})
    assert not same((one, 1), (one, 2))


def test_blocks_that_receive_other_things_in_every_window_are_refused(base):
    decoder = Decoder(base, torch.float32, CPU)
    calls = decoder.calls

    def with_tokens(windows):
        made = calls(windows)
        made[1].keywords["tokens"] = windows
        return made

    decoder.calls = with_tokens
    names = [name for index in range(3) for name in decoder.matrices(index).values()]
    patterns = dict.fromkeys(names, Unstructured(sparsity=0.5, threshold="row"))
    with pytest.raises(PruningError, match="mistral: what its blocks receive differs from window to window"):
        list(prune_blocks(decoder, WINDOWS, ScoreAndSelect(score="wanda"), patterns, batch=1, error_tokens=60))


def test_a_layer_that_no_token_reaches_is_named(base):
    decoder = Decoder(base, torch.float32, CPU)
    decoder.blocks[0].self_attn.register_module("idle", torch.nn.Linear(4, 4, device="meta"))
    decoder.tensor_names = lambda index, names=decoder.tensor_names: {k: v for k, v in names(index).items() if "idle" not in k}
    patterns = {name: Unstructured(sparsity=0.5, threshold="row") for index in range(3) for name in decoder.matrices(index).values()}
    blocks = prune_blocks(decoder, WINDOWS, ScoreAndSelect(score="wanda"), patterns, batch=5, error_tokens=60)
    with pytest.raises(PruningError, match="layer model.layers.0.self_attn.idle.weight: no calibration token reached it"):
        list(blocks)
