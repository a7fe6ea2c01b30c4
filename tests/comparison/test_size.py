import torch

from stages.checkpoint.delta import Change
from stages.comparison.size import size_measurements
from tests import deltas
from tests.evaluation.delta import UP


def test_bytes_by_hand(base, tmp_path):
    shape = base.shape(UP)
    mask = torch.arange(shape[0] * shape[1]).view(shape) % 4 != 0
    change, weights = Change(mask=mask), mask.numel()
    delta = deltas.write(tmp_path / "sparse", deltas.recipe(base=base.fingerprint), {UP: change}, [deltas.row(UP, mask)])
    sizes = {one.metric: one.value for one in size_measurements(base, delta, tmp_path / "sparse")}
    assert sizes["dense_bytes"] == 2 * weights  # bfloat16
    assert sizes["mask_bytes"] == weights / 8
    assert sizes["packed_bytes"] == weights / 8 + 2 * weights * 3 / 4
    assert sizes["delta_bytes"] == sum(file.stat().st_size for file in (tmp_path / "sparse").iterdir())
    assert sizes["mask_bytes"] < sizes["delta_bytes"] < sizes["packed_bytes"]
