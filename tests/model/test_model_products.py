"""The products of linear layers against their definitions, through whichever library they go."""

import pytest
import torch
import torch.nn.functional as F

from sret_scale.model.operations import matmul as products

# Narrow to wide and wide to narrow, whose weight gradients take different ways; odd sizes as in SReT-S and T.
SHAPES = [((2, 49, 63), 230), ((2, 49, 230), 63), ((5, 8), 8), ((1, 1, 3), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_products_are_those_of_autograd(
    shape: tuple[int, ...], channels: int, onednn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_HAS_AVX512_ONEDNN", onednn and products._HAS_AVX512_ONEDNN)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, shape[-1], generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    y = F.linear(x, weight, bias)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(grad)
    arguments = x.detach().to(dtype), weight.detach().to(dtype), grad.to(dtype)
    found = {
        "output": (products.linear(arguments[0], arguments[1], bias.to(dtype)), y),
        "input": (products.input_gradient(arguments[2], arguments[1]), x.grad),
        "weight": (products.weight_gradient(arguments[2], arguments[0]), weight.grad),
    }
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, (mine, wanted) in found.items():
        plain = wanted.detach()
        assert mine.dtype == dtype and mine.shape == plain.shape, name
        scale = float(plain.abs().max())
        assert float((mine - plain).abs().max()) <= tolerance * scale, name
        again = torch.equal(products.linear(arguments[0], arguments[1]), products.linear(arguments[0], arguments[1]))
        assert again, "a re-run must give the same bits"
