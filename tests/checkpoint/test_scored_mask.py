from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file

from stages.checkpoint import scored_mask
from stages.checkpoint.delta import Change, SparseDelta, read_block, write_block
from stages.checkpoint.scored_mask import ALL, ScoredMask
from stages.errors import CheckpointError
from stages.pruning.patterns import Nm, Unstructured
from tests import deltas

BLOCK = "block-00000.safetensors"
PATTERNS = [
    Unstructured(sparsity=0.5, comparison_group="row"),
    Unstructured(sparsity=0.3, comparison_group="row"),
    Unstructured(sparsity=Fraction(29, 96), comparison_group="row"),  # as an allocation asks: some rows have one zero more
    Unstructured(sparsity=0.55, comparison_group="matrix"),
    Unstructured(sparsity=0.0, comparison_group="row"),
    Unstructured(sparsity=0.97, comparison_group="matrix"),
    Nm(kept=2, group=4),
    Nm(kept=4, group=8),
    Nm(kept=0, group=2),
]


def tensors(shape: tuple[int, ...], *, ties: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, in bfloat16 as most checkpoints have them, and scales of their columns; ties: of few different values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    scales = torch.rand(shape[-1], generator=generator)
    if ties:
        weight, scales = (4 * weight).round() / 4, (2 * scales).round() / 2
    return weight.bfloat16(), scales


def chosen(weight: torch.Tensor, scales: torch.Tensor, pattern) -> torch.Tensor:
    return pattern.mask(weight.float().abs() * scales)


def scored(weight: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor, pattern, *, transposed: bool = False) -> ScoredMask | None:
    group = (pattern.kept, pattern.group) if isinstance(pattern, Nm) else None
    return ScoredMask.of(weight.float(), scales, mask, group=group, transposed=transposed)


def reading(weights: dict[str, torch.Tensor]):
    """Reads as Checkpoint.tensor does."""
    return lambda name, entry=None: weights[name] if entry is None else weights[name][entry]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("at_once", [2**22, 64])
def test_scales_and_thresholds_give_the_mask_that_the_pattern_chose(monkeypatch, pattern, ties, at_once):
    monkeypatch.setattr(scored_mask, "WEIGHTS_AT_ONCE", at_once)
    weight, scales = tensors((12, 32), ties=ties)
    mask = chosen(weight, scales, pattern)
    found = scored(weight, scales, mask, pattern)
    assert torch.equal(found.mask(weight), mask)
    assert (found.thresholds is None) == (found.group is not None) == isinstance(pattern, Nm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[6]], ids=str)
def test_a_base_of_any_dtype_gives_it(dtype, pattern):
    weight, scales = tensors((12, 32), ties=False)
    weight = (weight.double() * torch.rand(12, 32, dtype=torch.float64)).to(dtype)
    before, mask = weight.clone(), chosen(weight, scales, pattern)
    assert torch.equal(scored(weight, scales, mask, pattern).mask(weight), mask)
    assert torch.equal(weight, before)


def test_scales_are_a_copy():
    """A score may hand out what its statistic holds, which several matrices share."""
    weight, scales = tensors((12, 32), ties=False)
    found = scored(weight, scales, chosen(weight, scales, PATTERNS[0]), PATTERNS[0])
    assert found.scales.data_ptr() != scales.data_ptr()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_mask_of_a_matrix_that_is_stored_transposed_is_transposed(pattern):
    weight, scales = tensors((12, 32), ties=True)
    mask = chosen(weight, scales, pattern)
    found = scored(weight, scales, mask, pattern, transposed=True)
    assert torch.equal(found.mask(weight.T.contiguous()), mask.T)


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[3], PATTERNS[6]], ids=str)
def test_a_mask_that_scores_do_not_give_is_known(pattern):
    weight, scales = tensors((12, 32), ties=False)
    mask = chosen(weight, scales, pattern)
    mask[3] = mask[3].flip(0)
    assert scored(weight, scales, mask, pattern) is None


def test_ties_are_stored_only_where_some_of_a_score_are_kept():
    weight, scales = torch.tensor([[1.0, -2.0, 3.0, 4.0]]), torch.ones(4)
    half = Unstructured(sparsity=0.5, comparison_group="row")
    assert scored(weight, scales, chosen(weight, scales, half), half).ties is None
    alike = torch.tensor([[1.0, -1.0, 1.0, 4.0]])
    assert scored(alike, scales, chosen(alike, scales, half), half).ties.tolist() == [2]
    both = torch.cat([weight, alike])
    assert scored(both, scales, chosen(both, scales, half), half).ties.tolist() == [ALL, 2]


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[6]], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_one_tensor_have_scales_of_their_own(tmp_path, pattern, transposed):
    """The second has ties, the first has none; once as three dimensions, once as the two that a checkpoint may have."""
    experts = [tensors((12, 32), ties=bool(seed), seed=seed) for seed in range(2)]
    masks = [chosen(*one, pattern) for one in experts]

    def stored(tensor):
        return tensor.T.contiguous() if transposed else tensor

    changes = [
        Change(mask=stored(mask), scored=scored(*one, mask, pattern, transposed=transposed))
        for one, mask in zip(experts, masks, strict=True)
    ]
    together, expected = torch.stack([stored(weight) for weight, _ in experts]), torch.stack([stored(mask) for mask in masks])
    for shape in (tuple(together.shape), (2 * together.shape[1], together.shape[2])):
        write_block(tmp_path / BLOCK, {"a": Change.stacked(changes).of_shape(shape)}, "base1")
        assert not any(key.endswith(".mask") for key in load_file(tmp_path / BLOCK))
        change = read_block(tmp_path / BLOCK, reading({"a": together.view(shape)}))["a"]
        assert torch.equal(change.mask, expected.view(shape))
        assert torch.equal(change.apply(together.view(shape)), together.view(shape).masked_fill(~expected.view(shape), 0))


def test_experts_of_which_one_is_stored_by_bits_are_all_stored_by_bits():
    weight, scales = tensors((4, 8), ties=False)
    mask = chosen(weight, scales, PATTERNS[0])
    known = Change(mask=mask, scored=scored(weight, scales, mask, PATTERNS[0]))
    assert Change.stacked([known, Change(mask=mask)]).scored is None


@pytest.fixture()
def written(tmp_path):
    """A delta of two matrices by their scores, and the base's weights."""
    weights, changes = {}, {}
    for seed, (name, pattern) in enumerate({"a": PATTERNS[0], "b": PATTERNS[6]}.items()):
        weights[name], scales = tensors((16, 64), ties=seed == 0, seed=seed)
        mask = chosen(weights[name], scales, pattern)
        changes[name] = Change(mask=mask, scored=scored(weights[name], scales, mask, pattern))
    deltas.write(tmp_path, deltas.recipe(), changes, [deltas.row(name, change.mask) for name, change in changes.items()])
    return tmp_path, weights, changes


def test_a_delta_by_scores_comes_back_as_written(written):
    directory, weights, changes = written
    delta = SparseDelta(directory, "base1")
    assert delta.masks_alone
    for name, change in changes.items():
        read = delta.change(name, reading(weights))
        assert torch.equal(read.mask, change.mask)
        applied = delta.apply(name, weights[name])
        assert applied.dtype == torch.bfloat16
        assert torch.equal(applied, weights[name].masked_fill(~change.mask, 0))


def test_what_was_read_is_written_as_the_same_bytes(written, tmp_path):
    """A journal's blocks are read, and those that were not trained written again."""
    directory, weights, _ = written
    read = read_block(directory / BLOCK, reading(weights))
    write_block(tmp_path / "again.safetensors", read, "base1")
    assert (tmp_path / "again.safetensors").read_bytes() == (directory / BLOCK).read_bytes()


def test_a_change_with_new_values_is_stored_by_bits(written, tmp_path):
    _, weights, changes = written
    values = torch.ones(int(changes["a"].mask.sum())).bfloat16()
    write_block(tmp_path / BLOCK, {"a": changes["a"].with_values(values)}, "base1")
    assert set(load_file(tmp_path / BLOCK)) == {"a.mask", "a.values"}
    assert not SparseDelta(tmp_path, "base1").masks_alone
    assert torch.equal(read_block(tmp_path / BLOCK, deltas.no_base)["a"].apply(weights["a"]) != 0, changes["a"].mask)


# What does not fit is refused.


def test_other_weights_than_the_bases_are_refused(written):
    directory, weights, _ = written
    delta, other = SparseDelta(directory, "base1"), weights["a"].flip(1)
    message = f"{BLOCK}: tensor a.scales: found scores that give another mask, wanted those of the base that was pruned"
    with pytest.raises(CheckpointError, match=message):
        delta.apply("a", other)
    with pytest.raises(CheckpointError, match=message):
        delta.change("a", reading({"a": other}))
    with pytest.raises(CheckpointError, match=r"tensor a: found shape \[64, 16\], wanted \[16, 64\] as in "):
        delta.change("a", reading({"a": other.T}))


def test_as_many_weights_of_another_base_are_refused_though_the_count_is_the_same(written):
    directory, weights, _ = written
    with pytest.raises(CheckpointError, match=f"{BLOCK}: tensor b.scales: found scores that give another mask"):
        SparseDelta(directory, "base1").apply("b", weights["b"].flip(0))


def test_a_tensor_that_the_base_has_not_is_named(written):
    directory, weights, _ = written
    del weights["b"]
    with pytest.raises(CheckpointError, match=f"delta file .*{BLOCK}: tensor b: found no such tensor in the base"):
        read_block(directory / BLOCK, reading(weights))


def test_experts_that_a_checkpoint_stores_in_another_shape_than_fits_are_stored_by_bits():
    weight, scales = tensors((4, 8), ties=False)
    mask = chosen(weight, scales, PATTERNS[0])
    experts = Change.stacked([Change(mask=mask, scored=scored(weight, scales, mask, PATTERNS[0]))] * 2)
    assert experts.of_shape((8, 8)).scored is not None
    assert experts.of_shape((4, 16)).scored is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (lambda s: s.update(c={}), r"found scored \['c'\], wanted tensors with a shape"),
        (lambda s: s.update(a=3), r"tensor a: found scored as 3, wanted \['group', 'mask_sha256', 'transposed'\]"),
        (lambda s: s["a"].pop("group"), "tensor a: found scored as {.*}, wanted"),
        (lambda s: s["a"].update(transposed=1), "tensor a: found scored as {.*}, wanted"),
        (lambda s: s["a"].update(mask_sha256=3), "tensor a: found mask_sha256 3, wanted a SHA-256 in hexadecimal digits"),
        (lambda s: s["a"].update(mask_sha256="0"), "tensor a.scales: found scores that give another mask"),
        (lambda s: s["b"].update(group=[4, 2]), r"tensor b: found group \[4, 2\], wanted N and M with 0 <= N <= M and M in 2..16"),
        (lambda s: s["b"].update(group=[2, 128]), r"tensor b: found group \[2, 128\], wanted N and M"),
        (lambda s: s["b"].update(group=2), "tensor b: found group 2, wanted N and M"),
        (lambda s: s["b"].update(group=[1.0, 2]), r"tensor b: found group \[1.0, 2\], wanted N and M"),
        (lambda s: s["b"].update(group=[2, 5]), r"tensor b.scales: found shape \[64\], wanted \[columns\] .* in groups of 5"),
        (lambda s: s["b"].update(group=None), r"tensor b: found \['scales'\], wanted \['scales', 'thresholds'\] and perhaps ties"),
        (lambda s: s["a"].update(group=[2, 4]), r"tensor a: found \['scales', 'thresholds', 'ties'\], wanted \['scales'\]"),
        (lambda s: s["a"].update(transposed=True), r"tensor a.scales: found shape \[64\], wanted \[columns\] or"),
        (lambda s: s["b"].update(group=[1, 4]), "tensor b.scales: found scores that give another mask"),
    ],
)
def test_what_is_said_of_scores_and_does_not_fit_is_refused(written, facts, message):
    directory, weights, _ = written
    deltas.rewrite(directory / BLOCK, facts=lambda stated: facts(stated["scored"]))
    with pytest.raises(CheckpointError, match=message):
        read_block(directory / BLOCK, reading(weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.scales"), r"tensor a: found \['thresholds', 'ties'\], wanted \['scales', 'thresholds'\]"),
        (lambda t: t.pop("a.thresholds"), r"tensor a: found \['scales', 'ties'\], wanted \['scales', 'thresholds'\]"),
        (lambda t: t.update({"a.scales": t["a.scales"].double()}), "tensor a.scales: found dtype F64, wanted F32"),
        (lambda t: t.update({"a.ties": t["a.ties"].long()}), "tensor a.ties: found dtype I64, wanted I32"),
        (lambda t: t.update({"a.scales": torch.ones(63)}), r"tensor a.scales: found shape \[63\], wanted \[columns\] or \[experts, "),
        (lambda t: t.update({"a.scales": torch.ones(1, 1, 64)}), r"tensor a.scales: found shape \[1, 1, 64\], wanted \[columns\]"),
        (lambda t: t.update({"a.scales": torch.ones(0)}), r"tensor a.scales: found shape \[0\], wanted \[columns\]"),
        (lambda t: t.update({"a.thresholds": torch.ones(64)}), r"tensor a.thresholds: found shape \[64\], wanted \[16\]"),
        (lambda t: t.update({"a.mask": torch.ones(128).byte()}), r"found tensors \['a.mask'\], wanted only those of \['a', 'b'\]"),
        (lambda t: t["b.scales"].fill_(torch.inf), "tensor b.scales: found a score that is NaN or infinite, wanted finite scores"),
        (lambda t: t["a.thresholds"].fill_(torch.nan), "tensor a.scales: found scores that give another mask"),
    ],
)
def test_tensors_of_scores_that_do_not_fit_are_refused(written, change, message):
    directory, weights, _ = written
    deltas.rewrite(directory / BLOCK, change)
    with pytest.raises(CheckpointError, match=message):
        read_block(directory / BLOCK, reading(weights))


def test_a_mask_by_scores_takes_a_number_for_each_row_and_column(written):
    """Of a matrix of m by n weights 4 (m + n) bytes, and 4 m more where a row has ties; bits take mn / 8."""
    directory, _, changes = written
    stored = load_file(directory / BLOCK)
    assert {key: tensor.numel() for key, tensor in stored.items()} == {"a.scales": 64, "a.thresholds": 16, "a.ties": 16, "b.scales": 64}
    bits = {name: Change(mask=change.mask) for name, change in changes.items()}
    write_block(directory / "bits.safetensors", bits, "base1")
    assert load_file(directory / "bits.safetensors")["a.mask"].numel() == 16 * 64 // 8
