import json
import re
import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.checkpoint.delta import Change, SparseDelta, read_block, write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.errors import ConfigError, ReleaseError
from stages.release import loading
from stages.release.packing import pack
from stages.release.verification import Asked, count_in_each_group, verify
from stages.streaming.decoder import Decoder
from tests import architectures, deltas, tiny

NM = {"name": "nm", "kept": 2, "group": 4, "permutation_rounds": None}
BY_MATRIX = {**deltas.WANDA, "comparison_group": "matrix"}
OWL = {"name": "owl", "lowest": 0.25, "highest": 0.75, "multiple": 5.0, "strength": 0.08}
Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def every_second_column(base) -> dict[str, Change]:
    """Changes that prune every second column, and change the kept weights of one matrix."""
    changes = {}
    for name in deltas.matrices(base):
        mask = torch.zeros(base.shape(name), dtype=torch.bool)
        mask[:, ::2] = True
        changes[name] = Change(mask=mask, values=base.tensor(name)[mask] + 1 if name == UP else None)
    return changes


def written(directory, recipe, changes, base, rows=None):
    """A delta and its release: (release, delta)."""
    rows = rows or [deltas.row(name, change.mask) for name, change in changes.items()]
    delta = deltas.write(directory / "delta", recipe, changes, rows)
    (directory / "release").mkdir(exist_ok=True)
    pack(base, delta, directory / "release")
    return directory / "release", delta


@pytest.fixture()
def delta(base, tmp_path):
    return deltas.write(
        tmp_path / "delta",
        deltas.recipe(base=base.fingerprint),
        every_second_column(base),
        [deltas.row(name, change.mask) for name, change in every_second_column(base).items()],
    )


@pytest.fixture()
def release(base, delta, tmp_path):
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    return tmp_path / "release"


def test_a_release_as_written_passes_its_checks(release, base, delta):
    verified = verify(release, base, delta)
    assert (verified.matrices, verified.changed, verified.sparsity) == (21, 1, pytest.approx(0.5, abs=0.01))
    assert not (release / "delta.json").exists()


# What was asked, by hand.


@pytest.mark.parametrize(
    ("changes", "shape", "wanted"),
    [
        ({"pattern": {"name": "unstructured", "sparsity": 0.29}}, (3, 100), 29),  # 100 * 0.29 is just below 29 in binary
        ({"pattern": {"name": "unstructured", "sparsity": 0.5}}, (3, 7), 3),
        ({"pattern": {"name": "unstructured", "sparsity": 0.5}, "method": BY_MATRIX}, (3, 7), 10),
        ({"pattern": {**NM, "kept": 1}}, (3, 8), 3),
        ({"pattern": {**NM, "kept": 1, "group": 3}}, (3, 9), 2),  # 3 * (1 - 1/3) is just above 2 in binary
    ],
)
def test_what_a_recipe_asks_for(changes, shape, wanted):
    asked = Asked.by(deltas.recipe(**changes))
    assert asked.pruned_of(asked.group_size(*shape)) == wanted


def test_weights_are_counted_by_the_group_in_which_they_compete():
    marked = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    for changes, counts in (({}, [2, 1]), ({"method": BY_MATRIX}, [3]), ({"pattern": {**NM, "group": 2, "kept": 1}}, [2, 0, 1, 0])):
        asked = Asked.by(deltas.recipe(**changes))
        assert count_in_each_group(marked, asked.group_size(2, 4)).tolist() == counts


def test_a_recipe_of_another_version_is_refused_by_key(base):
    with pytest.raises(ConfigError, match="recipe.pattern: found .*'ratio'.* wanted the keys name, sparsity"):
        Asked.by(deltas.recipe(pattern={"name": "unstructured", "ratio": 0.5}))
    with pytest.raises(ConfigError, match="recipe.allocation.name: found 'error', wanted one of "):
        Asked.by(deltas.recipe(allocation={"name": "error"}))


# A mask that is not what was asked.


def damaged(delta: SparseDelta, name: str, change) -> SparseDelta:
    """The delta with another mask of one tensor, and a manifest whose counts are those of that mask."""
    block = delta.directory / "block-00000.safetensors"
    changes = read_block(block, deltas.no_base)
    mask = changes[name].mask
    change(mask)
    changes[name] = Change(mask=mask)
    write_block(block, changes, delta.recipe.base)
    rows = [deltas.row(row["tensor"], changes[row["tensor"]].mask) for row in delta.matrices]
    sparsity = sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows)
    write_manifest(delta.directory, recipe=delta.recipe, summary={"sparsity": sparsity, "relative_error": 0.2}, matrices=rows)
    return SparseDelta(delta.directory, delta.recipe.base)


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ({}, lambda mask: mask[3, 1].fill_(True), ", row 3: found 15 zeros, wanted 16 or more by the recipe"),
        ({}, lambda mask: mask[3, 0].fill_(False), ", row 3: found 17 pruned weights in the mask, wanted 16 by the recipe"),
        ({"method": BY_MATRIX}, lambda mask: mask[3, 1].fill_(True), ": found 511 zeros, wanted 512 or more by the recipe"),
        ({"method": BY_MATRIX}, lambda mask: mask[3, 0].fill_(False), ": found 513 pruned weights in the mask, wanted 512 by the recipe"),
        ({"pattern": NM}, lambda mask: mask[3, 5].fill_(True), ", row 3, columns 4 to 7: found 1 zeros, wanted 2 or more by the recipe"),
        (  # the matrix as a whole and each of its rows have the right counts
            {"pattern": NM},
            lambda mask: (mask[3, 5].fill_(True), mask[3, 8].fill_(False)),
            ", row 3, columns 4 to 7: found 1 zeros, wanted 2 or more by the recipe",
        ),
    ],
)
def test_a_pattern_that_prunes_one_weight_too_few_or_too_many_is_found_though_mask_manifest_and_bytes_agree(
    base, tmp_path, recipe, change, message
):
    _, delta = written(tmp_path, deltas.recipe(base=base.fingerprint, **recipe), every_second_column(base), base)
    verify(tmp_path / "release", base, delta)
    delta = damaged(delta, Q, change)
    pack(base, delta, tmp_path / "release")
    with pytest.raises(ReleaseError, match=f"^{re.escape(Q + message)}$"):
        verify(tmp_path / "release", base, delta)


def test_a_group_that_does_not_divide_the_columns_is_found(base, tmp_path):
    release, delta = written(
        tmp_path, deltas.recipe(base=base.fingerprint, pattern={**NM, "kept": 3, "group": 6}), every_second_column(base), base
    )
    with pytest.raises(ReleaseError, match=r"weight: found \d+ columns, wanted a multiple of 6 by the recipe's pattern"):
        verify(release, base, delta)


def allocated(base, odd: int = 0) -> dict[str, Change]:
    """Changes that prune 3 of 4 columns in every even block and a quarter in every odd one, and `odd` weights more in one matrix.

    tests.tiny has three blocks: the last loses half of each row.
    """
    changes = {}
    for name in deltas.matrices(base):
        columns = base.shape(name)[1]
        block = int(name.split(".")[2])
        pruned = columns * (3, 1, 2)[block] // 4
        mask = torch.ones(base.shape(name), dtype=torch.bool)
        mask[:, :pruned] = False
        changes[name] = Change(mask=mask)
    mask = changes[Q].mask
    mask[0, 10 : 10 + odd] = False
    changes[Q] = Change(mask=mask)
    return changes


def test_the_budget_of_an_allocation_is_met_by_all_matrices_together_to_the_weight(base, tmp_path):
    recipe = deltas.recipe(base=base.fingerprint, allocation=OWL)
    release, delta = written(tmp_path, recipe, allocated(base), base)
    assert verify(release, base, delta).matrices == 21
    release, delta = written(tmp_path, recipe, allocated(base, odd=1), base)
    total = sum(row["weights"] for row in delta.matrices)
    message = f"found {total // 2 + 1} pruned weights in all matrices together, wanted {total // 2}, the fraction 0.5 of {total}"
    with pytest.raises(ReleaseError, match=message):
        verify(release, base, delta)


@pytest.mark.parametrize("bounds", [{"lowest": 0.26}, {"highest": 0.74}])
def test_a_matrix_outside_the_bounds_of_its_allocation_is_found(base, tmp_path, bounds):
    recipe = deltas.recipe(base=base.fingerprint, allocation={**OWL, **bounds})
    release, delta = written(tmp_path, recipe, allocated(base), base)
    with pytest.raises(ReleaseError, match=r"weight: found \d+ pruned weights in the mask, wanted \d+ to \d+ by the allocation's bounds"):
        verify(release, base, delta)


def test_a_weight_more_in_one_matrix_of_an_allocation_and_one_less_in_another_are_found(base, tmp_path):
    changes = allocated(base)
    rows = [deltas.row(name, change.mask) for name, change in changes.items()]
    for name, column, kept in ((Q, -1, False), (Q.replace("layers.1", "layers.0"), 0, True)):
        mask = changes[name].mask
        mask[0, column] = kept
        changes[name] = Change(mask=mask)
    given = {row["tensor"]: row["asked"] for row in rows}
    rows = [deltas.row(name, change.mask) | {"asked": given[name]} for name, change in changes.items()]
    release, delta = written(tmp_path, deltas.recipe(base=base.fingerprint, allocation=OWL), changes, base, rows)
    with pytest.raises(ReleaseError, match="q_proj.weight: found 767 pruned weights in the mask, wanted 768 as the allocation gave it"):
        verify(release, base, delta)


# Matrices that do not lie in their tensor as [rows, columns].


def fetched(kind: str, directory) -> Checkpoint:
    """A checkpoint of this architecture as the fetch stage writes it."""
    return tiny.fetched(architectures.write(directory / "source", kind), directory)


@pytest.mark.parametrize("recipe", [{}, {"pattern": NM}])
def test_of_a_transposed_matrix_the_inputs_are_the_columns(tmp_path, recipe):
    base = fetched("gpt2", tmp_path)
    names = [name for name in base if re.search(r"h\.\d+\.(attn|mlp)\..*weight$", name)]
    pruned_inputs, pruned_outputs = {}, {}
    for name in names:
        inputs, outputs = torch.ones(base.shape(name), dtype=torch.bool), torch.ones(base.shape(name), dtype=torch.bool)
        inputs[::2], outputs[:, ::2] = False, False
        pruned_inputs[name], pruned_outputs[name] = Change(mask=inputs), Change(mask=outputs)
    recipe = deltas.recipe(base=base.fingerprint, **recipe)
    rows = [deltas.row(name, change.mask, transposed=True) for name, change in pruned_inputs.items()]
    release, delta = written(tmp_path, recipe, pruned_inputs, base, rows)
    assert verify(release, base, delta).matrices == len(names)
    release, delta = written(tmp_path, recipe, pruned_outputs, base, rows)
    with pytest.raises(ReleaseError, match=r"weight, row 1.*: found \d+ zeros, wanted \d+ or more by the recipe"):
        verify(release, base, delta)
    wrong = [deltas.row(name, change.mask, transposed=True) | {"transposed": False} for name, change in pruned_inputs.items()]
    release, delta = written(tmp_path, recipe, pruned_inputs, base, wrong)
    with pytest.raises(ReleaseError, match=r"weight: found shape \[96, 32\] and 3072 weights in the manifest, wanted \[32, 96\] and 3072"):
        verify(release, base, delta)


def test_each_expert_of_a_tensor_is_a_matrix(tmp_path):
    base = fetched("granitemoe", tmp_path)
    names = [name for name in base if len(base.shape(name)) == 3]
    assert names
    changes = {}
    for name in names:
        mask = torch.ones(base.shape(name), dtype=torch.bool)
        mask[..., ::2] = False
        changes[name] = Change(mask=mask)
    rows = [deltas.row(name, changes[name].mask, expert=expert) for name in names for expert in range(base.shape(name)[0])]
    recipe = deltas.recipe(base=base.fingerprint)
    release, delta = written(tmp_path, recipe, changes, base, rows)
    assert verify(release, base, delta).matrices == len(rows)

    mask = changes[names[0]].mask
    mask[2, 1, 0] = True
    mask[3, 1, 1] = False  # the tensor as a whole has the right count
    changes[names[0]] = Change(mask=mask)
    rows = [deltas.row(name, changes[name].mask, expert=expert) for name in names for expert in range(base.shape(name)[0])]
    release, delta = written(tmp_path, recipe, changes, base, rows)
    with pytest.raises(ReleaseError, match=re.escape(f"{names[0]}[2], row 1: found")):
        verify(release, base, delta)

    release, delta = written(tmp_path, recipe, changes, base, rows[1:])
    with pytest.raises(ReleaseError, match=r"found the experts \[1, 2, 3\] in the manifest, wanted each of \['0', '1', '2', '3'\] once"):
        verify(release, base, delta)


def test_groups_are_of_consecutive_columns_in_the_order_that_the_release_has_them_in(base, tmp_path):
    changes = every_second_column(base)
    order = torch.arange(base.shape(Q)[1], dtype=torch.int32).flip(0)
    changes[Q].columns = order
    recipe = deltas.recipe(base=base.fingerprint, pattern={**NM, "permutation_rounds": 1})
    release, delta = written(tmp_path, recipe, changes, base)
    assert verify(release, base, delta).matrices == 21


# The bytes.


def spoil(release, name: str, change) -> None:
    """Change one tensor of a written release."""
    for shard in release.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda t: t[0].add_(1), "model.norm.weight: out of scope, yet its bits differ"),
        ("model.embed_tokens.weight", lambda t: t[0, 0].mul_(-1), "model.embed_tokens.weight: out of scope"),
        (Q, lambda t: t[0, 1].fill_(3), "q_proj.weight, row 0: found 15 zeros, wanted 16 or more"),
        (Q, lambda t: t[0, 0].add_(3), "q_proj.weight: its kept weights differ from the base's"),
        (Q, lambda t: t.neg_(), "q_proj.weight: its kept weights differ from the base's"),
        (UP, lambda t: t[0, 0].add_(3), "up_proj.weight: its kept weights differ from the delta's"),
    ],
)
def test_one_wrong_bit_is_found(release, base, delta, name, change, message):
    spoil(release, name, change)
    with pytest.raises(ReleaseError, match=message):
        verify(release, base, delta)


def test_a_pruned_weight_that_is_not_zero_is_found_where_a_kept_one_is(base, tmp_path):
    """The number of zeros is right; only the mask tells."""
    changes = every_second_column(base)
    kept = base.tensor(Q)[changes[Q].mask]
    kept[0] = 0
    changes[Q].values = kept
    release, delta = written(tmp_path, deltas.recipe(base=base.fingerprint), changes, base)
    assert verify(release, base, delta).changed == 2
    spoil(release, Q, lambda tensor: tensor[0, 1].fill_(3))
    with pytest.raises(ReleaseError, match="q_proj.weight: found 1 pruned weights that are not zero, wanted none"):
        verify(release, base, delta)


def test_a_tensor_of_another_dtype_is_found(release, base, delta):
    for shard in release.glob("*.safetensors"):
        tensors = {name: tensor.float() if name == Q else tensor for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ReleaseError, match=r"q_proj.weight: found torch.float32 of shape \[32, 32\], wanted torch.bfloat16 of \[32, 32\]"):
        verify(release, base, delta)


def test_a_tensor_that_is_missing_is_found(release, base, delta):
    index = release / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    shard = release / table["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(table))
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != "model.norm.weight"}, shard)
    with pytest.raises(ReleaseError, match=r"found tensors \['model.norm.weight'\] on one side only"):
        verify(release, base, delta)


# The manifest.


def test_a_matrix_that_the_manifest_has_and_the_files_lack_is_found(release, base, delta):
    delta.matrices.append({**delta.matrices[0], "tensor": "model.norm.weight"})
    with pytest.raises(ReleaseError, match=r"do not have the same matrices: \['model.norm.weight'\]"):
        verify(release, base, delta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(zeros=3), "weight: found 512 pruned weights in the mask, wanted 3 as in the manifest"),
        (lambda row: row.update(weights=3), r"weight: found shape \[32, 32\] and 3 weights in the manifest, wanted \[32, 32\] and 1024"),
        (lambda row: row.update(shape=[3, 3]), r"weight: found shape \[3, 3\] and 1024 weights in the manifest, wanted \[32, 32\]"),
        (lambda row: row.update(expert=0), r"weight: found the experts \[0\] in the manifest, wanted each of \['None'\] once"),
        (lambda row: row.pop("shape"), "found matrices with .* in the manifest, wanted shape for each; run the prune stage again"),
    ],
)
def test_a_manifest_that_says_something_else_than_the_masks_is_found(release, base, delta, change, message):
    change(next(row for row in delta.matrices if row["tensor"] == Q))
    with pytest.raises(ReleaseError, match=message):
        verify(release, base, delta)


def test_a_summary_that_is_not_that_of_the_matrices_is_found(release, base, delta):
    delta.summary["sparsity"] = 0.6
    with pytest.raises(ReleaseError, match=r"delta: found sparsity 0.6 in the manifest, wanted 0.5"):
        verify(release, base, delta)


def test_a_mask_of_another_shape_than_the_base_has_is_found(base, tmp_path, release, delta):
    changes = every_second_column(base)
    changes[Q] = Change(mask=changes[Q].mask[:16].contiguous())
    rows = [deltas.row(name, change.mask) for name, change in changes.items()]
    delta = deltas.write(tmp_path / "delta", delta.recipe, changes, rows)
    with pytest.raises(ReleaseError, match=r"q_proj.weight: found a mask of shape \[16, 32\], wanted \[32, 32\] as in the base"):
        verify(release, base, delta)


# Stock transformers.


@pytest.mark.parametrize("key", ["quantization_config", "sparsity_config"])
def test_a_config_that_promises_a_format_is_found(release, base, delta, key, monkeypatch):
    stock = tiny.model()
    setattr(stock.config, key, {"quant_method": "x"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (stock, {}))
    with pytest.raises(ReleaseError, match="its config names a quantisation or sparsity format"):
        verify(release, base, delta)


def test_a_release_that_stock_transformers_does_not_find_whole_is_refused(release, base, delta, monkeypatch):
    loaded = (tiny.model(), {"missing_keys": {"lm_head.weight"}, "unexpected_keys": set()})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    with pytest.raises(ReleaseError, match=r"stock transformers reports \{'missing_keys': \['lm_head.weight'\]\}"):
        verify(release, base, delta)


NOTHING, PLENTY = 0, 2**40  # bytes of free memory


@pytest.mark.parametrize(("free", "message"), [(PLENTY, "in stock transformers"), (NOTHING, "of the release, block by block,")])
def test_logits_that_differ_from_base_and_delta_are_found(release, base, delta, free, message):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ReleaseError, match=f"logits {message} differ"):
        verify(release, base, delta, free)


def test_a_model_is_loaded_whole_where_its_weights_take_at_most_half_of_the_free_memory(release, base, delta):
    size = sum(base.stored(name).nbytes for name in base)
    assert verify(release, base, delta, 2 * size).loaded.loading == "whole"
    assert verify(release, base, delta, 2 * size - 1).loaded.loading == "streamed"


def test_what_a_model_takes_is_counted_in_the_dtype_that_it_is_loaded_in(base, tmp_path):
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    stored = Checkpoint(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert loading._bytes_loaded(stored) == 2 * sum(stored.stored(name).nbytes for name in stored)
    (copy / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}))
    assert loading._bytes_loaded(stored) == sum(stored.stored(name).nbytes for name in stored)


def test_a_tensor_that_the_release_lacks_is_found_without_loading_it(release, base, delta, tmp_path):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ReleaseError, match=r"stock transformers reports \{'missing_keys': \['model.layers.3."):
        verify(release, base, delta, NOTHING)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "granitemoe", "deepseek_v3"])
def test_releases_of_other_architectures_are_streamed_too(tmp_path, kind):
    """Tied and untied heads, transposed matrices, experts in a tensor each and in one."""
    base = fetched(kind, tmp_path)
    layout = Decoder(base, torch.float32, torch.device("cpu"))
    masks, rows = {}, []
    for matrix in (matrix for of_block in layout.matrices for matrix in of_block):
        masks.setdefault(matrix.tensor, torch.ones(base.shape(matrix.tensor), dtype=torch.bool))
        matrix.stored_in(masks[matrix.tensor])[:, ::2] = False
    changes = {name: Change(mask=mask) for name, mask in masks.items()}
    for matrix in (matrix for of_block in layout.matrices for matrix in of_block):
        rows.append(deltas.row(matrix.tensor, masks[matrix.tensor], expert=matrix.expert, transposed=matrix.transposed))
    release, delta = written(tmp_path, deltas.recipe(base=base.fingerprint), changes, base, rows)
    assert verify(release, base, delta, NOTHING).loaded.loading == "streamed"


def test_the_sparsity_of_a_recipe_is_that_of_the_decimal_written():
    assert Asked.by(deltas.recipe(pattern={"name": "unstructured", "sparsity": 0.29})).pattern.exact_sparsity == Fraction(29, 100)
    assert Asked.by(deltas.recipe(pattern=NM)).pattern.exact_sparsity == Fraction(1, 2)
