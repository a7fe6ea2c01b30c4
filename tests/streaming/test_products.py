"""Products of tokens with weights, however a function is called."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from stages.streaming.products import Factors, Products, Use, multiplied_parameters

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


CAST_CALLS = {
    "float": lambda weight: weight.float(),
    "to": lambda weight: weight.to(torch.float32),
    "to by name": lambda weight: weight.to(dtype=torch.float32),
    "type": lambda weight: weight.type(torch.float32),
    "type_as": lambda weight: weight.type_as(TOKENS),
    "twice": lambda weight: weight.to(torch.float64).float(),
    "transposed": lambda weight: weight.T.float().T,
}


@pytest.mark.parametrize("mode", [Products, Factors])
@pytest.mark.parametrize("cast", CAST_CALLS)
def test_a_product_with_a_cast_of_a_weight_is_seen_each_time_it_is_cast(cast, mode):
    weight, seen = WEIGHT.bfloat16(), []
    with mode({"weight": weight}, lambda *product: seen.append(product)):
        for _ in range(3):
            linear(TOKENS, CAST_CALLS[cast](weight))
            linear(TOKENS, torch.randn(3, 2))  # which may be where an earlier cast was
    keys = [product[0] if mode is Products else product[0][0][0] for product in seen]
    assert keys == ["weight"] * 3


def test_a_slice_of_a_cast_is_known_as_the_slice_of_the_weight():
    weight, seen = torch.randn(4, 3, 2).bfloat16(), []
    with Products(dict(enumerate(weight)), lambda *product: seen.append(product)):
        for expert in (2, 0):
            linear(TOKENS, weight.float()[expert])
            linear(TOKENS, weight[expert].float())
    assert [key for key, *_ in seen] == [2, 2, 0, 0]


class Casting(nn.Module):
    """Multiplies by casts of its parameters: of a matrix, of experts, and not of what it only adds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.experts, self.bias = (nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 2), (4, 3, 3), (5, 3)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(linear(tokens.float(), self.matrix.float()), self.experts.float()[1]) + self.bias.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_multiplied_whatever_they_are_cast_to(dtype):
    uses = multiplied_parameters(Casting().to(dtype), lambda block: block(TOKENS))
    assert uses == {"matrix": Use(transposed=False), "experts": Use(transposed=False)}
