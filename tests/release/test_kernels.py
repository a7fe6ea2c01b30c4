import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.delta import Change
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.errors import ReleaseError
from stages.files import sha256, write_json
from stages.pruning.patterns import Nm
from stages.release.__main__ import main
from stages.release.kernels import macko
from stages.release.kernels.converting import check, convert
from stages.release.kernels.semi_structured import SemiStructured, reason_against
from stages.release.packing import pack, write_sums
from stages.release.zeros import write_zeros
from tests import deltas, tiny


def by_rule(matrix: np.ndarray) -> tuple[list[float], list[int], list[int]]:
    """Values, counts of zeros before them and ends of rows, element by element: what the layout's description says."""
    values, deltas_, ends = [], [], [0]
    for row in matrix:
        last = max((place for place, value in enumerate(row) if value), default=-1)
        skipped = 0
        for value in row[: last + 1]:
            if value or skipped == 15:
                values.append(float(value))
                deltas_.append(skipped)
                skipped = 0
            else:
                skipped += 1
        ends.append(len(values))
    return values, deltas_, ends


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.98, 1.0])
def test_macko_is_its_rule_and_comes_back(sparsity):
    generator = torch.Generator().manual_seed(int(100 * sparsity))
    matrix = torch.randn(37, 211, generator=generator).half()
    matrix[torch.rand(matrix.shape, generator=generator) < sparsity] = 0
    values, packed, ends = macko.encode(matrix)
    wanted, counts, wanted_ends = by_rule(matrix.numpy())
    assert ends.tolist() == wanted_ends
    assert values.tolist() == wanted + [0.0] * (-len(wanted) % 8)
    padded = counts + [0] * (-len(counts) % 8)
    assert packed.tolist() == [low | high << 4 for low, high in zip(padded[::2], padded[1::2], strict=True)]
    assert torch.equal(macko.decode(values, packed, ends, matrix.shape[1]), matrix)


def test_macko_takes_float16_alone():
    with pytest.raises(ValueError, match="found torch.bfloat16, wanted torch.float16"):
        macko.encode(torch.zeros(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_comes_back(dtype):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight *= Nm(kept=2, group=4).mask(weight.float().abs())
    layer = SemiStructured(weight, None)
    assert reason_against(weight) is None
    assert torch.equal(layer.dense(), weight)
    assert layer.values.numel() == weight.numel() / 2


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(64, 64, dtype=torch.bfloat16), "more than 2 of 4 consecutive inputs"),
        (torch.zeros(48, 64, dtype=torch.float16), "a shape of 48 x 64, wanted multiples of 32 x 64"),
        (torch.zeros(64, 64), "weights of torch.float32"),
    ],
)
def test_what_semi_structured_kernels_do_not_take(weight, reason):
    assert reason in reason_against(weight)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of sizes that semi-structured kernels take, but for keys and values."""
    directory = tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "base", hidden_size=64, intermediate_size=128)
    hashed = {path.name: sha256(path) for path in directory.iterdir()}
    write_json(directory / PROVENANCE, {"source": "local", "name": "tiny", "files": hashed})
    return Checkpoint(directory)


@pytest.fixture(params=["half", "2:4"])
def release(request, base, tmp_path):
    """Each matrix with half its weights zero, at random or two of four."""
    generator, changes = torch.Generator().manual_seed(0), {}
    for name in deltas.matrices(base):
        scores = torch.rand(base.shape(name), generator=generator)
        changes[name] = Change(mask=Nm(kept=2, group=4).mask(scores) if request.param == "2:4" else scores > 0.5)
    rows = [deltas.row(name, change.mask) for name, change in changes.items()]
    delta = deltas.write(tmp_path / "delta", deltas.recipe(base=base.fingerprint), changes, rows)
    directory = tmp_path / "release"
    directory.mkdir()
    pack(base, delta, directory)
    write_zeros(directory, delta)
    write_sums(directory)
    return request.param, directory


def test_a_converted_release_has_the_logits_of_the_dense_one(release):
    pattern, directory = release
    found = check(directory, "macko")
    assert found.equal
    assert not found.conversion.left
    assert 0.5 < found.conversion.converted / found.conversion.dense < 0.75
    if pattern == "2:4":
        taken = check(directory, "semi_structured")
        assert taken.equal
        assert len(taken.conversion.layers) == 3 * 5
        assert {name.split(".")[-1]: reason.split(",")[0] for name, reason in taken.conversion.left.items()} == {
            "k_proj": "a shape of 16 x 64",
            "v_proj": "a shape of 16 x 64",
        }
        assert taken.conversion.converted / taken.conversion.dense == 0.5625


def test_conversion_replaces_the_layers(release):
    _, directory = release
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
    weights = {name: module.weight.clone() for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    conversion = convert(model, "macko")
    for name in conversion.layers:
        assert torch.equal(model.get_submodule(name).dense(), weights[name])
    assert "lm_head" not in conversion.layers
    assert set(weights) - set(conversion.layers) == {"lm_head"}


def test_conversion_wants_the_dtype_of_the_kernel(release):
    model = AutoModelForCausalLM.from_pretrained(release[1], dtype=torch.bfloat16)
    with pytest.raises(ReleaseError, match=r"found a model of torch.bfloat16, wanted torch.float16"):
        convert(model, "macko")


def test_command(release, capsys):
    pattern, directory = release
    main(["kernel", str(directory), "macko"])
    assert "bit for bit" in capsys.readouterr().out
    if pattern == "half":
        with pytest.raises(SystemExit, match="found no layer that semi_structured takes"):
            main(["kernel", str(directory), "semi_structured"])


def test_command_wants_a_release(tmp_path):
    with pytest.raises(SystemExit, match=r"sparsity\.json"):
        main(["kernel", str(tmp_path), "macko"])
