"""Every architecture, streamed, against a plain whole-model reference that knows nothing of blocks or streams."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from stages import prune
from stages.checkpoint.delta import SparseDelta, write_block, write_manifest
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.errors import ArchitectureError
from stages.pruning.allocations import loss
from stages.pruning.block_loop import Plan, PrunedBlock, prune_blocks
from stages.pruning.entries import DenseModel
from stages.pruning.patterns import Nm, Unstructured
from stages.recipe import Recipe
from stages.release.packing import pack
from stages.release.verification import verify
from stages.sources import base as checkpoints
from stages.sources.base import LocalBase
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import architectures, tiny
from tests.methods import WANDA, sparsegpt

CPU = torch.device("cpu")
BATCH = 2
HALF = Unstructured(sparsity=0.5, comparison_group="row")
WINDOWS = torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(0))
UNTOUCHED = re.compile(
    r"embed|wte|wpe|lm_head|embed_out|norm|ln_|bias|(mlp|moe|feed_forward)\.gate\.weight|shared_expert_gate|router|e_score"
    r"|conv\.weight|conv_?1d|A_log|\.D$|dt_bias|time_(decay|first|mix)|ln\d|ln_out|pre_ln|recurrent_param|sinks|layer_scalar|^head\.weight|per_layer_model_projection|altup_(unembed_)?projections|correct_output_scale"
    r"|encoder_attn"  # of a decoder without its encoder
)
SPARSEGPT = sparsegpt()
WANDA_HALF = {
    "method": {"name": "wanda", "comparison_group": "row"},
    "pattern": {"name": "unstructured", "sparsity": 0.5},
    "allocation": {"name": "uniform"},
    "reconstruction": {"name": "none"},
    "prune": {},
    "calibration": "random",
    "label": "wanda",
    "pattern_label": "unstructured",
}


def fetched(kind: str, directory: Path) -> Checkpoint:
    """A checkpoint of this architecture as the fetch stage writes it."""
    return tiny.fetched(architectures.write(directory / "source", kind), directory)


def streamed(
    base: Checkpoint, method, pattern, expert_tokens: int = 0, windows: torch.Tensor = WINDOWS, batch: int = BATCH, dtype=torch.float32
):
    decoder = Decoder(base, dtype, CPU)
    names = [matrix.name for block in decoder.matrices for matrix in block]
    plan = Plan(method=method, patterns=dict.fromkeys(names, pattern), propagate="pruned", error_tokens=60, expert_tokens=expert_tokens)
    with decoder.before_blocks():
        stream = Stream(decoder, windows, batch=batch)
    return decoder, list(prune_blocks(stream, plan))


def mask_of(changes: dict, matrix) -> torch.Tensor:
    """[rows, columns]"""
    return matrix.stored_in(changes[matrix.tensor].mask)


@contextmanager
def inputs_of(model, parameters: dict[str, torch.nn.Parameter]) -> Iterator[dict]:
    """(parameter, expert) -> the tokens that its product read, one tensor a call; experts' routing worked out here."""
    seen, names, hooks = {}, {id(parameter): name for name, parameter in parameters.items()}, []

    def of_linear(module, arguments):
        seen.setdefault((names[id(module.weight)], None), []).append(arguments[0])

    def of_groups(module, arguments):
        for group, tokens in enumerate(arguments[0].unbind(dim=-2)):
            seen.setdefault((names[id(module.weight)], group), []).append(tokens.reshape(1, -1, tokens.shape[-1]))

    def of_experts(module, arguments):
        tokens, chosen, _ = arguments
        product = torch.matmul if module.is_transposed else linear
        biases = [getattr(module, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj")]
        for expert in range(len(module.down_proj)):
            own = tokens[(chosen == expert).any(dim=-1)]
            between = product(own, module.gate_up_proj[expert])
            between = module._apply_gate(between if biases[0] is None else between + biases[0][expert])
            seen.setdefault((names[id(module.gate_up_proj)], expert), []).append(own[None])
            seen.setdefault((names[id(module.down_proj)], expert), []).append(between[None])

    def of_experts_some_without_weights(module, arguments):
        """LongCat's last experts hand tokens on as they are."""
        tokens, chosen, _ = arguments
        for expert in range(len(module.down_proj)):
            own = tokens[(chosen == expert).any(dim=-1)]
            gate, up = linear(own, module.gate_up_proj[expert]).chunk(2, dim=-1)
            seen.setdefault((names[id(module.gate_up_proj)], expert), []).append(own[None])
            seen.setdefault((names[id(module.down_proj)], expert), []).append((module.act_fn(gate) * up)[None])

    def of_experts_without_gates(module, arguments):
        tokens, chosen, _ = arguments
        for expert in range(len(module.down_proj)):
            own = tokens[(chosen == expert).any(dim=-1)]
            seen.setdefault((names[id(module.up_proj)], expert), []).append(own[None])
            seen.setdefault((names[id(module.down_proj)], expert), []).append(module.act_fn(linear(own, module.up_proj[expert]))[None])

    def of_expert_in_rows(module, arguments):
        tokens, gate, up, _ = arguments
        expert = (gate.data_ptr() - module.w1.data_ptr()) // (gate.numel() * gate.element_size())
        for name in ("w1", "v1"):
            seen.setdefault((names[id(getattr(module, name))], expert), []).append(tokens[None])
        between = module.activation_fn(linear(tokens, gate)) * linear(tokens, up)
        seen.setdefault((names[id(module.w2)], expert), []).append(between[None])

    def of_all_experts(module, arguments):
        """Tokens times the weight of each expert; 0 where it was not chosen."""
        for expert, tokens in enumerate(arguments[0].view(len(module.down_proj), -1, module.hidden_size)):
            gate, up = (tokens @ module.gate_up_proj[expert]).chunk(2, dim=-1)
            seen.setdefault((names[id(module.gate_up_proj)], expert), []).append(tokens[None])
            seen.setdefault((names[id(module.down_proj)], expert), []).append((up * module.act_fn(gate))[None])

    def of_parallel_experts(module, arguments):
        for expert, tokens in enumerate(arguments[0].split(arguments[1])):
            seen.setdefault((names[id(module.weight)], expert), []).append(tokens[None])

    def of_gates(module, arguments):
        """A matrix for each head, which reads its part of every token."""
        heads = arguments[0].reshape(-1, module.num_attention_heads, module.block_width).transpose(0, 1)
        for head, tokens in enumerate(heads):
            for weight in (module.input_gate_weight, module.recurrent_gate_weight):
                seen.setdefault((names[id(weight)], head), []).append(tokens[None])

    def of_shared_experts(module, arguments, keywords):
        """Every one of them reads all tokens, and its last projection reads them scaled."""
        hidden, scales = (*arguments, *keywords.values())
        tokens, scales = hidden.flatten(0, 1), scales.reshape(-1, len(module.gate_proj))
        for expert in range(len(module.gate_proj)):
            gate, up = (linear(tokens, getattr(module, name)[expert]) for name in ("gate_proj", "up_proj"))
            between = module.act_fn(gate) * up * scales[:, expert, None]
            for name, read in (("gate_proj", tokens), ("up_proj", tokens), ("down_proj", between)):
                seen.setdefault((names[id(getattr(module, name))], expert), []).append(read[None])

    def of_distances(module, arguments):
        seen.setdefault((names[id(module.proj)], None), []).append(arguments[0])

    def heads_of(mixer):
        """Zamba multiplies every head of what its convolution gives by a matrix, and of what that gives the time steps by another one."""

        def of_heads(_, __, projected):
            states = projected.mT.unflatten(1, (-1, 2))[:, :, 0].contiguous()
            states = mixer.act(mixer.conv1d(states)[..., : projected.shape[1]])
            for head, of_head in enumerate(states.unflatten(1, (mixer.n_mamba_heads, -1)).unbind(dim=1)):
                steps = (mixer.x_proj_weight[head] @ of_head)[:, : mixer.time_step_rank]
                for name, read in (("x_proj_weight", of_head), ("dt_proj_weight", steps)):
                    seen.setdefault((names[id(getattr(mixer, name))], head), []).append(read.mT.contiguous())

        return mixer.in_proj.register_forward_hook(of_heads)

    def streams_of(mixer):
        """Hyper-connections multiply all streams of a token by a parameter, after their norm or, with magnitudes, before it."""
        key = names[id(mixer.fn)], None
        if hasattr(mixer, "hc_post_magnitude"):
            return mixer.register_forward_pre_hook(lambda _, arguments: seen.setdefault(key, []).append(arguments[0].flatten(2)))
        return mixer.input_norm.register_forward_hook(lambda _, __, output: seen.setdefault(key, []).append(output))

    def time_steps_of(mixer):
        """Mamba multiplies by the weight of this layer, and does not call it."""
        key = names[id(mixer.dt_proj.weight)], None
        return lambda _, __, output: seen.setdefault(key, []).append(output[..., : mixer.time_step_rank])

    for module in model.modules():
        if hasattr(module, "x_proj") and id(getattr(getattr(module, "dt_proj", None), "weight", None)) in names:
            hooks.append(getattr(module, "dt_layernorm", module.x_proj).register_forward_hook(time_steps_of(module)))
        elif hasattr(module, "n_groups") and isinstance(module, torch.nn.Linear) and id(module.weight) in names:
            hooks.append(module.register_forward_pre_hook(of_groups))
        elif isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) in names:
            hooks.append(module.register_forward_pre_hook(of_linear))
        elif id(getattr(module, "gate_up_proj", None)) in names:
            others = of_experts_some_without_weights if hasattr(module, "identity_expert") else of_all_experts
            hooks.append(module.register_forward_pre_hook(of_experts if hasattr(module, "is_transposed") else others))
        elif id(getattr(module, "gate_proj", None)) in names:
            hooks.append(module.register_forward_pre_hook(of_shared_experts, with_kwargs=True))
        elif id(getattr(module, "x_proj_weight", None)) in names:
            hooks.append(heads_of(module))
        elif id(getattr(module, "proj", None)) in names:
            hooks.append(module.register_forward_pre_hook(of_distances))
        elif id(getattr(module, "up_proj", None)) in names:
            hooks.append(module.register_forward_pre_hook(of_experts_without_gates))
        elif id(getattr(module, "fn", None)) in names:
            hooks.append(streams_of(module))
        elif id(getattr(module, "w1", None)) in names:
            hooks.append(module.register_forward_pre_hook(of_expert_in_rows))
        elif id(getattr(module, "weight", None)) in names:
            hooks.append(module.register_forward_pre_hook(of_parallel_experts))
        elif id(getattr(module, "input_gate_weight", None)) in names:
            hooks.append(module.register_forward_pre_hook(of_gates))
    yield seen
    for hook in hooks:
        hook.remove()


def length_of(matrix, tokens: torch.Tensor) -> int:
    """How many of a layer's tokens are a window: of an expert all that chose it; a module may read one token more, before each window."""
    whole = matrix.parameter_slice.expert is None and tokens[..., 0].numel() % WINDOWS.shape[1] == 0
    return WINDOWS.shape[1] if whole else max(1, tokens.shape[1])


@torch.no_grad()
def plain_wanda(decoder: Decoder, sparsity: float, auto_class: type = AutoModelForCausalLM):
    """The published procedure, the whole model run anew for every block (arXiv:2306.11695, algorithm 1)."""
    model = auto_class.from_pretrained(decoder.checkpoint.directory, dtype=torch.float32).eval().requires_grad_(False)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    all_parameters, masks = dict(model.named_parameters()), {}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    full_names = [
        {matrix: f"{decoder.prefix}.{index}.{matrix.parameter_slice.name}" for matrix in of_block}
        for index, of_block in enumerate(decoder.matrices)
    ]
    shared = {name: all_parameters[name] for full in full_names for name in full.values() if uses[id(all_parameters[name])] > 1}

    def run() -> None:
        for start in range(0, len(WINDOWS), BATCH):
            model(WINDOWS[start : start + BATCH], use_cache=False)

    with inputs_of(model, shared) as dense:  # matrices that several blocks have are pruned for what all of these read in the dense model
        run()
    for full in full_names:
        with inputs_of(model, {name: all_parameters[name] for name in full.values()}) as seen:
            run()
        seen |= {key: read for key, read in dense.items() if key in seen}
        for matrix, name in full.items():
            norm = sum(
                tokens.view(-1, length_of(matrix, tokens), tokens.shape[-1]).square().sum(dim=(0, 1))
                for tokens in seen[name, matrix.parameter_slice.expert]
            )
            parameter, rows = all_parameters[name], matrix.shape[1 if matrix.transposed else 0]
            in_groups = parameter.dim() == 2 and matrix.parameter_slice.expert is not None
            weight = matrix.parameter_slice.of(parameter.unflatten(0, (-1, rows)) if in_groups else parameter)
            weight = weight.T if matrix.transposed else weight
            order = torch.sort(weight.abs() * norm.sqrt(), dim=1, stable=True).indices
            drop = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, order[:, : int(weight.shape[1] * sparsity)], True)
            weight[drop] = 0
            masks[matrix.name] = ~drop
    return model, masks


def written(directory: Path, base: Checkpoint, blocks: list[PrunedBlock]) -> SparseDelta:
    """The delta of blocks that Wanda pruned at 50%, with its manifest."""
    directory.mkdir()
    rows = []
    for block in blocks:
        write_block(directory / f"block-{block.index:05d}.safetensors", block.changes, base.fingerprint)
        rows += [prune.matrix_row(block, one, {one.matrix.name: HALF}) for one in block.matrices]
    write_manifest(directory, recipe=Recipe(**WANDA_HALF, base=base.fingerprint), summary=prune.summarise(rows), matrices=rows)
    return SparseDelta(directory, base.fingerprint)


@pytest.mark.parametrize("kind", architectures.CONFIGS)
def test_the_streamed_result_is_that_of_the_whole_model_and_the_release_is_sound(kind, tmp_path):
    base = fetched(kind, tmp_path)
    decoder, blocks = streamed(base, WANDA, HALF)
    model, masks = plain_wanda(decoder, 0.5)
    changes = {name: change for block in blocks for name, change in block.changes.items()}
    matrices = [matrix for block in decoder.matrices for matrix in block]
    assert changes.keys() == {matrix.tensor for matrix in matrices}
    for matrix in matrices:
        mask = mask_of(changes, matrix)
        assert torch.equal(mask, masks[matrix.name]), matrix.name
        assert ((~mask).sum(dim=1) == matrix.shape[1] // 2).all()
    assert all(re.search(UNTOUCHED, name) for name in base if name not in changes), [name for name in base if name not in changes]
    assert not any(re.search(UNTOUCHED, name) for name in changes)

    delta = written(tmp_path / "sparse", base, blocks)
    assert not any(key.endswith(".mask") for file in delta.directory.glob("*.safetensors") for key in load_file(file))  # by scores alone
    ours = load_model(base, delta.apply, dtype=torch.float32, device=CPU)
    if model._can_set_experts_implementation():
        ours.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(ours(WINDOWS).logits, model(WINDOWS).logits)
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    verified = verify(tmp_path / "release", base, delta)  # every other tensor bit by bit, and stock transformers' logits
    assert verified.matrices == len(masks)
    assert verified.sparsity == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("kind", architectures.REFUSED)
def test_what_cannot_be_handled_is_refused_by_name_and_reason_before_any_weight_is_read(kind, tmp_path, monkeypatch):
    base = fetched(kind, tmp_path)
    monkeypatch.setattr(Checkpoint, "tensor", None)
    reason = f"^{kind}: {re.escape(architectures.REFUSED[kind][1])}; this architecture is not supported$"
    with pytest.raises(ArchitectureError, match=reason):
        _ = Decoder(base, torch.float32, CPU).matrices


def test_at_least_twenty_five_architectures_are_covered():
    asked = """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neo gpt_neox gptj opt bloom falcon mpt
    stablelm starcoder2 cohere olmo olmo2 granite smollm3 mixtral qwen2_moe qwen3_moe olmoe"""
    assert set(asked.split()) <= set(architectures.CONFIGS)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "mixtral"])
def test_sparsegpt_compensates_whatever_holds_the_weights(kind, tmp_path):
    base = fetched(kind, tmp_path)
    pattern = Nm(kept=2, group=4)
    _, swept = streamed(base, SPARSEGPT, pattern)
    decoder, cut = streamed(base, WANDA, pattern)
    for matrix in decoder.matrices[0]:  # later blocks read different inputs
        mask = mask_of(swept[0].changes, matrix)
        assert (mask.reshape(mask.shape[0], -1, 4).sum(dim=2) == 2).all()
    errors = [{one.matrix.name: one.relative_error for one in blocks[0].matrices} for blocks in (swept, cut)]
    assert sum(errors[0].values()) < sum(errors[1].values())


def test_an_expert_that_too_few_tokens_chose_is_calibrated_on_all_and_says_so(tmp_path):
    base = fetched("mixtral", tmp_path)
    wanda, half = WANDA, HALF
    decoder, blocks = streamed(base, wanda, half, expert_tokens=10**6)
    experts = [one for one in blocks[0].matrices if one.matrix.parameter_slice.expert is not None]
    assert {one.calibrated_on for one in experts} == {"all tokens"}
    assert {one.calibrated_on for one in blocks[0].matrices if one.matrix.parameter_slice.expert is None} == {"its tokens"}
    # Two of four experts a token: together they saw each of the 100 tokens twice, in each of three matrices.
    assert sum(one.tokens for one in experts) == 2 * 3 * WINDOWS.numel()

    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    entered = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # not pruned yet when statistics are collected: as stored
        assert f"model.layers.0.self_attn.{name}.weight" in blocks[0].changes
    with torch.no_grad():
        for start in range(0, len(WINDOWS), BATCH):
            model(WINDOWS[start : start + BATCH], use_cache=False)
    norm = torch.cat(entered).square().sum(dim=0).sqrt()
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
        assert torch.equal(blocks[0].changes[name].mask, half.mask(base.tensor(name).float().abs() * norm))


def test_an_expert_that_no_token_chose_is_pruned_all_the_same(tmp_path):
    base = fetched("mixtral", tmp_path)
    one_token = WINDOWS[:1, :2]
    _, blocks = streamed(base, WANDA, HALF, 1, one_token, 1)
    unseen = [one for block in blocks for one in block.matrices if one.tokens == 0]
    assert unseen
    assert {one.calibrated_on for one in unseen} == {"all tokens"}


def test_experts_stored_as_one_tensor_are_pruned_one_by_one(tmp_path):
    """As a checkpoint saved from the model's own parameters has them."""
    separate = fetched("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(separate.directory, dtype=torch.bfloat16)
    (tmp_path / "fused").mkdir()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "fused/model.safetensors")
    model.config.save_pretrained(tmp_path / "fused")
    tiny.tokenizer().save_pretrained(tmp_path / "fused")
    local = LocalBase(source="local", path=str(tmp_path / "fused"), name="tests/fused", fingerprint=None, license="mit")
    (tmp_path / "fused-base").mkdir()
    checkpoints.fetch(local, tmp_path / "fused-base", downloads=tmp_path / "unused")
    _, one_by_one = streamed(separate, WANDA, HALF)
    decoder, fused = streamed(Checkpoint(tmp_path / "fused-base"), WANDA, HALF)
    down = fused[1].changes["model.layers.1.mlp.experts.down_proj"].mask
    for expert in range(4):
        expected = one_by_one[1].changes[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"].mask
        assert torch.equal(down[expert], expected)
    assert "model.layers.0.mlp.experts.down_proj[3]" in {matrix.name for matrix in decoder.matrices[0]}


@pytest.mark.parametrize("method", [WANDA, SPARSEGPT])
def test_an_expert_that_no_token_chose_is_calibrated_on_all_even_where_none_are_asked_for(tmp_path, method):
    base = fetched("mixtral", tmp_path)
    _, blocks = streamed(base, method, HALF, expert_tokens=0, windows=WINDOWS[:1, :2], batch=1)
    unseen = [one for block in blocks for one in block.matrices if one.tokens == 0]
    assert unseen
    assert {one.calibrated_on for one in unseen} == {"all tokens"}
    assert all(one.relative_error > 0 for one in unseen)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_what_transformers_keeps_in_float32_stays_so_in_bfloat16(kind, tmp_path):
    base = fetched(kind, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.bfloat16)
    ours = load_model(base, None, dtype=torch.bfloat16, device=CPU)
    dtypes = {name: tensor.dtype for name, tensor in stock.state_dict().items()}
    assert torch.float32 in dtypes.values()
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == dtypes
    decoder = Decoder(base, torch.bfloat16, CPU)
    with decoder.loaded(2, decoder.read(2)) as block:
        for name, tensor in block.state_dict().items():
            assert tensor.dtype == dtypes[f"{decoder.prefix}.2.{name}"], name


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_nothing_outside_the_blocks_keeps_its_weights(kind, tmp_path):
    decoder = Decoder(fetched(kind, tmp_path), torch.float32, CPU)
    for scope in (decoder.before_blocks, decoder.after_blocks):
        with scope():
            pass
        assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_float16_on_a_bfloat16_checkpoint_scores_the_stored_weights(tmp_path):
    """Values that float16 rounds to zero are still told apart."""
    decoder = Decoder(fetched("granitemoe", tmp_path), torch.float16, CPU)
    for matrix in decoder.matrices[0]:
        tensor = decoder.checkpoint.tensor(matrix.tensor)
        expected = (tensor if matrix.expert is None else tensor[matrix.expert]).float()
        with decoder.loaded(0, decoder.read(0)) as block:
            assert torch.equal(decoder.stored(matrix, block), expected)


@pytest.mark.parametrize("kind", ["gemma4_text", "glm_moe_dsa"])
def test_an_option_that_takes_gradients_through_more_than_hidden_states_is_refused_before_a_block_is_read(kind, tmp_path, monkeypatch):
    decoder = Decoder(fetched(kind, tmp_path), torch.float32, CPU)
    monkeypatch.setattr(Decoder, "read", None)
    reason = f"{kind}: its blocks hand on more than hidden states, through which {{}} takes no gradients"
    chosen = compose.read("reconstruction=distilled", "allocation=loss")
    with pytest.raises(ArchitectureError, match=reason.format("reconstruction=distilled")):
        prune.plan_of(decoder, WANDA, chosen["pattern"], chosen["allocation"], chosen["reconstruction"], chosen["prune"])
    dense = DenseModel(decoder=decoder, windows=WINDOWS, stream=partial(Stream, decoder, batch=BATCH), comparison_group="row")
    with pytest.raises(ArchitectureError, match=reason.format("allocation=loss")):
        loss.evidence(dense, chosen["allocation"])
