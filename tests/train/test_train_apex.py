"""The door to NVIDIA apex, with stand-ins of both projects of that name: the right one computes torch's update.

The stand-in of the kernels is plain torch with the arguments of NVIDIA's: what a GPU does is not tested here.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from sret_scale.config.run_config import OptimConfig
from sret_scale.model import ParameterTag
from sret_scale.train.engine.apex_door import choose_kernels, find_apex
from sret_scale.train.optim import build_optimizer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Applier:
    """As `apex.multi_tensor_apply.multi_tensor_applier`."""

    def __init__(self, *, available: bool) -> None:
        self.available = available

    def __call__(self, kernel: object, flag: Tensor, lists: list[list[Tensor]], *args: object) -> object:
        assert flag.dtype == torch.int32 and self.available
        return kernel(65536, flag, lists, *args)


def update_of(lists: Sequence[Tensor], betas: tuple[float, float], eps: float, step: int, is_corrected: int) -> Tensor:
    """Adam's direction after the moments were updated in place."""
    g, _, m, v = lists
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
    assert is_corrected == 1
    return (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)


def multi_tensor_adam(
    chunk: int, flag: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, *others: float
) -> None:
    eps, step, mode, is_corrected, decay = others
    assert mode == 1, "decoupled decay"
    for tensors in zip(*lists, strict=True):
        update = update_of(tensors, (beta1, beta2), eps, int(step), int(is_corrected))
        tensors[1].sub_(lr * (update + decay * tensors[1]))


def multi_tensor_lamb(
    chunk: int, flag: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, *others: object
) -> None:
    eps, step, is_corrected, decay, is_averaged, mode, grad_norm, max_grad_norm, is_everywhere = others
    assert (is_averaged, mode, is_everywhere) == (1, 1, True) and float(grad_norm) <= max_grad_norm  # type: ignore
    for tensors in zip(*lists, strict=True):
        value = tensors[1]
        update = update_of(tensors, (beta1, beta2), eps, step, is_corrected) + decay * value  # type: ignore
        norms = value.norm(), update.norm()
        value.sub_(lr * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * update)


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apex that exports what NVIDIA's does."""
    package, apply, kernels = (ModuleType(name) for name in ("apex", "apex.multi_tensor_apply", "amp_C"))
    package.__path__ = []
    apply.multi_tensor_applier = Applier(available=True)  # type: ignore[attr-defined]
    kernels.multi_tensor_adam, kernels.multi_tensor_lamb = multi_tensor_adam, multi_tensor_lamb  # type: ignore
    for module in (package, apply, kernels):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def install(monkeypatch: pytest.MonkeyPatch, applier: Applier | None) -> None:
    """Another project of the name, or NVIDIA's without its kernels."""
    package = ModuleType("apex")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "apex", package)
    if applier:
        apply = ModuleType("apex.multi_tensor_apply")
        apply.multi_tensor_applier = applier  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", apply)


@pytest.mark.parametrize("applier", [None, Applier(available=True), Applier(available=False)])
def test_another_apex_changes_nothing(monkeypatch: pytest.MonkeyPatch, applier: Applier | None) -> None:
    install(monkeypatch, applier)
    assert choose_kernels(CUDA) == (None, "optimizer: fused kernels of torch")


def test_kernels_without_an_available_applier_are_passed_over(monkeypatch: pytest.MonkeyPatch, nvidia: None) -> None:
    sys.modules["apex.multi_tensor_apply"].multi_tensor_applier.available = False
    assert find_apex() is None


def test_the_right_one_is_said_in_a_line_and_only_on_cuda(nvidia: None) -> None:
    kernels, text = choose_kernels(CUDA)
    assert kernels is not None and text == "optimizer: fused kernels of NVIDIA apex"
    assert choose_kernels(CPU) == (None, "optimizer: torch, on cpu")


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_the_right_one_gives_the_same_numbers(nvidia: None, rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    tags = {name: ParameterTag("tied", decay=True) for name, _ in model.named_parameters()}
    config = OptimConfig(optimizer=rule, learning_rate=0.05, weight_decay=0.2)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, tags, config)
    (group,) = optimizer.param_groups
    kernels = find_apex()
    assert kernels
    values = [value.detach().clone() for value in model.parameters()]
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    counts = [0] * len(values)
    for step in range(4):
        # The second layer takes no part in the second step, so the kernels are called with two counts after that.
        moving = [index for index in range(4) if index < 2 or step != 1]
        for index, value in enumerate(model.parameters()):
            value.grad = torch.randn_like(value) if index in moving else None
        lists = [values, [value.grad for value in model.parameters()], *moments]
        counts = [count + (index in moving) for index, count in enumerate(counts)]
        chosen = [[kind[index].clone() if kind is lists[1] else kind[index] for index in moving] for kind in lists]
        getattr(kernels, rule)(chosen, [counts[index] for index in moving], group)
        optimizer.step()
    for got, expected in zip(values, model.parameters(), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)
