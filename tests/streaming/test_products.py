"""Products of tokens with weights, however a function is called."""

import pytest
import torch
from torch.nn.functional import linear

from stages.streaming.products import Products

WEIGHT, TOKENS, BIAS = torch.randn(3, 2), torch.randn(5, 2), torch.zeros(5, 3)
CALLS = {
    "linear": lambda: linear(TOKENS, WEIGHT),
    "linear by name": lambda: linear(weight=WEIGHT, input=TOKENS),
    "matmul": lambda: TOKENS @ WEIGHT.T,
    "matmul by name": lambda: torch.matmul(input=TOKENS, other=WEIGHT.T),
    "matmul of a tensor by name": lambda: TOKENS.matmul(other=WEIGHT.T),
    "mm by name": lambda: torch.mm(input=TOKENS, mat2=WEIGHT.T),
    "bmm by name": lambda: torch.bmm(TOKENS[None], mat2=WEIGHT.T[None]),
    "addmm by name": lambda: torch.addmm(BIAS, mat1=TOKENS, mat2=WEIGHT.T),
    "baddbmm by name": lambda: torch.baddbmm(BIAS[None], batch1=TOKENS[None], batch2=WEIGHT.T[None]),
    "the weight first": lambda: torch.matmul(WEIGHT, other=TOKENS.T).T,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_product_is_seen(call):
    seen = []
    with Products({"weight": WEIGHT}, lambda *product: seen.append(product)):
        output = CALLS[call]()
    ((key, tokens, outputs),) = seen
    assert key == "weight"
    assert torch.equal(tokens.reshape(5, 2), TOKENS)
    torch.testing.assert_close(outputs.reshape(5, 3), TOKENS @ WEIGHT.T)
    torch.testing.assert_close(output.reshape(5, 3), TOKENS @ WEIGHT.T)
