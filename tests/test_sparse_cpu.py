import numpy as np
import pytest

from benchmarks.sparse_cpu import RUNTIMES, missing, table

FACTS = {
    "rows": [
        {"runtime": "torch, dense", "tokens": 1, "milliseconds": {"0": 4.0, "0.5": 4.0, "0.9": 2.0}},
        {"runtime": "scipy, CSR", "tokens": 1, "milliseconds": {"0": 8.0, "0.5": 4.0, "0.9": 1.0}},
    ],
    "versions": {"torch": "2.0", "openvino": None},
    "device": "a CPU",
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_computes_the_product(name):
    if (library := missing(name)) is not None:
        pytest.skip(f"{library} is not installed")
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((48, 32), dtype=np.float32) * (generator.random((48, 32)) > 0.5)
    inputs = generator.standard_normal((32, 3), dtype=np.float32)
    product = RUNTIMES[name](weight, inputs, 0.5)()
    found = product[0].T if "OpenVINO" in name else np.asarray(product)
    np.testing.assert_allclose(found, weight @ inputs, atol=0.2 if "8 bits" in name else 1e-4)


def test_times_stand_over_those_of_the_dense_product_without_zeros():
    assert "| scipy, CSR | 1 | 8.00 ms (0.50 ×) | 4.00 ms (1.00 ×) | 1.00 ms (4.00 ×) |" in table(FACTS)
    assert "with torch 2.0." in table(FACTS)
