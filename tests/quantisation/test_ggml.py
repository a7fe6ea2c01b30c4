import ctypes
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import gguf
import numpy as np
import pytest
import torch

from stages.checkpoint.model import load_model
from stages.errors import ArchitectureError, ConfigError
from stages.evaluation.metric import Corpus, window_means
from stages.evaluation.metrics import METRICS
from stages.evaluation.scoring import StreamedModels
from stages.quantisation import ggml
from stages.quantisation.ggml import TYPES, Quantiser, fitting, ggml_base, quantised, type_named
from stages.streaming.decoder import Decoder
from tests import architectures
from tests.pruning.test_architectures import fetched

CPU = torch.device("cpu")
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TYPES_OF_32 = ["Q4_0", "Q5_0", "Q5_1", "Q8_0"]
KEEP_ZEROS = {"F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q3_K"}
BITS = dict(F16=16, BF16=16, Q8_0=8.5, Q6_K=6.5625, Q5_K=5.5, Q5_1=6, Q5_0=5.5, Q4_K=4.5, Q4_0=4.5, Q3_K=3.4375, Q2_K=2.625)
LARGEST_ERROR = {"Q2_K": 0.0075, "Q3_K": 0.004}  # of test-quantize-fns of llama.cpp, of which the others' is 0.002
GATE, DOWN = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, name: str) -> float:
    return ((quantised(weight, TYPES[name]) - weight).norm() / weight.norm()).item()


def made_of(base) -> Decoder:
    return Decoder(base, torch.float32, CPU)


def test_a_weight_takes_the_bits_of_llama_cpps_table():
    assert {name: 8 * of.bytes_per_weight for name, of in TYPES.items()} == BITS


def test_eight_bits_are_the_nearest_127th_of_the_blocks_largest_weight():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([127.0, -64.0, 2.4, 0.4])
    assert quantised(weight, TYPES["Q8_0"])[0, :5].tolist() == [127, -64, 2, 0, 0]


def test_four_bits_are_the_nearest_eighth_of_the_blocks_largest_weight():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-8.0, 8.0, 2.4, 0.4])
    assert quantised(weight, TYPES["Q4_0"])[0, :5].tolist() == [-8, 7, 2, 0, 0]


@pytest.mark.parametrize("name", TYPES_OF_32)
def test_gguf_writes_the_bytes_of_llama_cpps_own_library(name):
    weight = gaussian(16, 512).numpy()
    assert np.array_equal(gguf.quantize(weight, TYPES[name].code), ggml._by_ggml(weight, TYPES[name]))


@pytest.mark.parametrize("name", K_TYPES)
def test_gguf_dequantises_as_llama_cpps_own_library_does(name):
    weight, of = gaussian(16, 512), TYPES[name]
    blocks, values = ggml._by_ggml(weight.numpy(), of), np.empty((16, 512), dtype=np.float32)
    dequantise = getattr(ggml_base(), f"dequantize_row_{name.lower().replace('k', 'K')}")
    dequantise.argtypes, dequantise.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    dequantise(blocks.ctypes.data, values.ctypes.data, values.size)
    assert np.array_equal(quantised(weight, of).numpy(), values)


@pytest.mark.parametrize("name", [*TYPES_OF_32, *K_TYPES])
def test_an_error_is_within_the_bounds_of_llama_cpps_own_test(name):
    weight = (0.1 + 2 * torch.arange(4096).float().cos())[None]
    error = (quantised(weight, TYPES[name]) - weight).double().square().sum().sqrt().item() / 4096
    assert error < LARGEST_ERROR.get(name, 0.002)


def test_an_error_halves_with_every_bit_or_nearly():
    errors = [relative_error(gaussian(64, 1024), name) for name in K_TYPES]
    assert all(0.35 < more_bits / fewer_bits < 0.6 for fewer_bits, more_bits in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("name", TYPES)
def test_exact_zeros_stay_so_in_types_without_an_offset_alone(name):
    weight = gaussian(64, 1024)
    zero = gaussian(64, 1024, seed=1) > 0
    weight[zero] = 0
    kept = bool((quantised(weight, TYPES[name])[zero] == 0).all())
    assert kept == (name in KEEP_ZEROS)


@pytest.mark.parametrize("name", TYPES)
def test_a_matrix_of_zeros_stays_zero(name):
    assert not quantised(torch.zeros(2, 256), TYPES[name]).any()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_a_matrix_keeps_its_dtype_and_is_not_written_to(name):
    weight = gaussian(4, 256).bfloat16()
    before = weight.clone()
    result = quantised(weight, TYPES[name])
    assert (result.dtype, result.shape) == (torch.bfloat16, weight.shape)
    assert torch.equal(weight, before)
    assert torch.equal(result, quantised(weight.float(), TYPES[name]).bfloat16())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_a_transposed_view_is_quantised_along_its_rows(name):
    weight = gaussian(256, 256)
    assert torch.equal(quantised(weight.T, TYPES[name]), quantised(weight.T.contiguous(), TYPES[name]))


@pytest.mark.parametrize(("name", "columns", "block"), [("Q4_K", 288, 256), ("Q8_0", 48, 32)])
def test_columns_that_do_not_divide_into_blocks_are_refused(name, columns, block):
    with pytest.raises(ValueError, match=rf"^{name}: found a matrix of shape \[2, {columns}\], wanted columns in multiples of {block}$"):
        quantised(torch.zeros(2, columns), TYPES[name])


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q5_1", "Q2_K"])
def test_scales_beyond_float16_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: found weights up to 3e\\+06, wanted weights whose scales float16 can represent$"):
        quantised(torch.full((1, 256), 3e6), TYPES[name])


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match="^quantisation type: found 'Q7', wanted one of F16, BF16, Q8_0, Q6_K"):
        type_named("Q7")


@pytest.fixture()
def reloaded(monkeypatch):
    """No library is loaded before the test, and none of the test's is left."""
    ggml_base.cache_clear()
    yield monkeypatch
    ggml_base.cache_clear()


def test_without_the_package_the_error_says_what_installs_it(reloaded, base):
    def missing(name):
        raise PackageNotFoundError(name)

    reloaded.setattr(ggml, "files", missing)
    message = r"^found no package libggml-python, wanted its libggml-base: .* pip install -c constraints.txt -e '\.\[ruler\]' brings it$"
    with pytest.raises(ConfigError, match=message):
        quantised(torch.zeros(1, 256), TYPES["Q4_K"])
    assert not quantised(torch.zeros(1, 256), TYPES["Q4_0"]).any()


def test_a_package_without_the_library_is_refused(reloaded):
    reloaded.setattr(ggml, "files", lambda _: [])
    with pytest.raises(ConfigError, match="^package libggml-python: found none of libggml-base.so, .* in it; it quantises"):
        ggml_base()


def test_a_quantiser_that_lacks_the_library_is_not_made(reloaded, tmp_path):
    decoder = made_of(fetched_with_rows_of_256(tmp_path))
    reloaded.setattr(ggml, "files", lambda _: [])
    with pytest.raises(ConfigError, match="^package libggml-python"):
        Quantiser.for_decoder(decoder, "Q4_K")


def fetched_with_rows_of_256(directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.CONFIGS, "llama", {**architectures.SIZES, "hidden_size": 256, "num_hidden_layers": 1})
        return fetched("llama", directory)


@pytest.mark.parametrize(
    ("wanted", "columns", "used"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q2_K", 576, "Q4_0"),
        ("Q3_K", 576, "Q4_0"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("Q2_K", 112, "F16"),
        ("Q8_0", 576, "Q8_0"),
    ],
)
def test_rows_that_do_not_divide_get_the_type_that_llama_cpp_takes(base, wanted, columns, used):
    matrix = replace(made_of(base).matrices[0][0], shape=(2, columns))
    assert fitting(matrix, TYPES[wanted]).name == used


def test_a_matrix_for_which_there_is_no_other_type_is_named(base):
    message = r"down_proj.weight: found a matrix of shape \[32, 112\], wanted columns in multiples of 32 for Q4_0, for which llama.cpp"
    with pytest.raises(ArchitectureError, match=message):
        Quantiser.for_decoder(made_of(base), "Q4_0")


def test_a_matrix_beyond_float16_is_named(base):
    quantiser = Quantiser.for_decoder(made_of(base), "Q4_K")
    with pytest.raises(ArchitectureError, match=f"^{GATE}: Q5_0: found weights up to 3e\\+06, wanted"):
        quantiser(GATE, torch.full((112, 32), 3e6))


def test_the_bytes_of_a_model_are_those_of_the_types_that_are_used(base):
    """Of each block 32 rows of 112 weights get F16, and the other matrices, of 32 weights a row, Q4_0."""
    quantiser = Quantiser.for_decoder(made_of(base), "Q2_K")
    others = 2 * 32 * 32 + 2 * 8 * 32 + 2 * 112 * 32
    assert {quantiser.types[DOWN].name, quantiser.types[GATE].name} == {"F16", "Q4_0"}
    assert quantiser.bytes_per_weight == pytest.approx((32 * 112 * 2 + others * 18 / 32) / (32 * 112 + others), rel=1e-12)
    assert quantiser.shares == {"Q4_0": pytest.approx(others / (32 * 112 + others)), "F16": pytest.approx(32 * 112 / (32 * 112 + others))}


def test_no_weight_is_read_for_the_bytes(base, monkeypatch):
    monkeypatch.setattr(type(base), "tensor", None)
    assert Quantiser.for_decoder(made_of(base), "Q6_K").bytes_per_weight > 34 / 32


def test_the_matrices_of_blocks_are_quantised_and_nothing_else(base):
    decoder = made_of(base)
    quantiser = Quantiser.for_decoder(decoder, "Q3_K")
    in_scope = {matrix.tensor for block in decoder.matrices for matrix in block}
    for name in base:
        tensor = base.tensor(name)
        expected = quantised(tensor.float(), quantiser.types[name]) if name in in_scope else tensor
        assert torch.equal(quantiser(name, tensor), expected), name


def test_a_matrix_stored_transposed_is_quantised_along_its_inputs(tmp_path):
    base = fetched("gpt2", tmp_path)
    name = "transformer.h.0.mlp.c_fc.weight"  # [32 inputs, 48 outputs]
    result = Quantiser.for_decoder(made_of(base), "Q4_K")(name, base.tensor(name))
    assert torch.equal(result, quantised(base.tensor(name).float().T, TYPES["Q5_0"]).T)


def test_every_expert_of_a_tensor_is_quantised(tmp_path):
    base = fetched("granitemoe", tmp_path)
    decoder = made_of(base)
    matrix = next(matrix for matrix in decoder.matrices[0] if matrix.expert is not None and matrix.shape[1] == 32)
    result = Quantiser.for_decoder(decoder, "Q4_K")(matrix.tensor, base.tensor(matrix.tensor))
    for expert, stored in enumerate(base.tensor(matrix.tensor)):
        assert torch.equal(result[expert], quantised(stored.float(), TYPES["Q5_0"]))


def test_a_streamed_model_and_a_whole_one_have_the_same_quantised_weights(base, tmp_path):
    decoder, windows = made_of(base), torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    quantiser = Quantiser.for_decoder(decoder, "Q4_K")
    corpus, models = (
        Corpus(name="a", windows=windows, clusters=[0, 1]),
        StreamedModels(decoder=decoder, variants={"q": quantiser}, scratch=tmp_path),
    )
    observed = models.observe([corpus], [METRICS["perplexity"]])["q"]["a"]
    model = load_model(base, quantiser, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    assert window_means(observed["nll"]) == pytest.approx(losses, rel=1e-5)
    assert torch.equal(model.state_dict()[GATE], quantised(base.tensor(GATE).float(), TYPES["Q5_0"]))
