import pytest
import torch

from stages.checkpoint.delta import Change
from stages.errors import ArchitectureError
from stages.quantisation.float8 import Float8, dequantise, quantise
from tests import deltas


def test_a_row_is_scaled_to_the_largest_float8():
    codes, scales = quantise(torch.tensor([[448.0, -224.0, 0.0], [0.0, 1.0, 0.25]]))
    assert scales.tolist() == [[1.0], [pytest.approx(1 / 448)]]
    assert codes.float().tolist() == [[448.0, -224.0, 0.0], [0.0, 448.0, 112.0]]
    assert dequantise(codes, scales)[0].tolist() == [448.0, -224.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zero_and_weights_lose_a_sixteenth_at_most(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).to(dtype) * (torch.rand(64, 96, generator=generator) > 0.5)
    codes, scales = quantise(weight)
    made = dequantise(codes, scales)
    assert scales.dtype == dtype
    assert (made[weight == 0] == 0).all()
    normal = weight.abs() > scales.float() * 2**-6  # below it, steps are equal
    assert ((made - weight.float()).abs() <= weight.float().abs() * 2**-4)[normal].all()


def test_a_row_of_zeros_has_a_scale():
    codes, scales = quantise(torch.zeros(1, 4, dtype=torch.float16))
    assert scales.item() > 0
    assert dequantise(codes, scales).tolist() == [[0.0] * 4]


def test_matrices_in_scope_are_rounded_and_no_others(base, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    change = Change(mask=torch.rand(base.shape(name), generator=torch.Generator().manual_seed(0)) > 0.5)
    delta = deltas.write(tmp_path, deltas.recipe(base=base.fingerprint), {name: change}, [deltas.row(name, change.mask)])
    weight, other = base.tensor(name), base.tensor("lm_head.weight")
    rounded = Float8(delta)
    assert torch.equal(rounded(name, weight), dequantise(*quantise(weight * change.mask)))
    assert torch.equal(rounded("lm_head.weight", other), other)


@pytest.mark.parametrize("changes", [{"transposed": True}, {"expert": 0}])
def test_what_is_no_linear_layer_of_its_own_is_refused(base, tmp_path, changes):
    mask = torch.ones(1, 4, 4, dtype=torch.bool) if "expert" in changes else torch.ones(4, 4, dtype=torch.bool)
    row = deltas.row("h.0.attn.weight", mask, **changes)
    delta = deltas.write(tmp_path, deltas.recipe(base=base.fingerprint), {"h.0.attn.weight": Change(mask=mask)}, [row])
    with pytest.raises(ArchitectureError, match=r"publish.dtype=float8: found h.0.attn.weight.*, wanted weights of linear layers"):
        Float8(delta)
