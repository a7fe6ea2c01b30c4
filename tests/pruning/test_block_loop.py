import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.reader import Checkpoint
from stages.errors import PruningError
from stages.pruning.architecture import Decoder
from stages.pruning.block_loop import prune_blocks, relative_error
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
    assert all(".layers." in name for name in changes)


def test_an_architecture_whose_tensors_have_other_names_is_refused(tmp_path, base):
    renamed = Checkpoint(base.directory)
    renamed.shard_of = {name.replace("self_attn", "attention"): shard for name, shard in renamed.shard_of.items()}
    with pytest.raises(PruningError, match="mistral: the checkpoint has no tensor model.layers.0.self_attn"):
        Decoder(renamed, torch.float32, CPU)


def test_activations_that_are_not_finite_name_the_layer(base):
    class Broken(Checkpoint):
        def tensor(self, name):
            tensor = super().tensor(name)
            return tensor * 1e38 if name == "model.layers.1.mlp.up_proj.weight" else tensor

    decoder = Decoder(Broken(base.directory), torch.float32, CPU)
    names = [name for index in range(3) for name in decoder.matrices(index).values()]
    patterns = dict.fromkeys(names, Unstructured(sparsity=0.5, threshold="row"))
    with pytest.raises(PruningError, match=r"layer (mlp.down_proj|model.layers.1.mlp)"):
        list(prune_blocks(decoder, WINDOWS, ScoreAndSelect(score="wanda"), patterns, batch=5, error_tokens=60))
