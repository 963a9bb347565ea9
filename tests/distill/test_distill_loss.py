"""The losses equal their plain twins and the published formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.distill import DistillConfig, distillation_loss, soft_loss
from tests.reference import losses as twin


def random_batch(seed: int, batch: int = 3, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(batch, classes, generator=generator)
    teacher = 3 * torch.randn(batch, classes, generator=generator)
    target = torch.rand(batch, classes, generator=generator).softmax(-1)
    return student, teacher, target


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 5),
    classes=st.integers(2, 9),
    temperature=st.floats(0.5, 10),
    hard_weight=st.floats(0, 1),
    label_smoothing=st.floats(0, 0.9),
)
def test_mixture_equals_its_twin(
    seed: int, batch: int, classes: int, temperature: float, hard_weight: float, label_smoothing: float
) -> None:
    student, teacher, target = random_batch(seed, batch, classes)
    config = DistillConfig(temperature=temperature, hard_weight=hard_weight, label_smoothing=label_smoothing)
    expected = (1 - hard_weight) * twin.soft_loss(student.tolist(), teacher.tolist(), temperature)
    expected += hard_weight * twin.hard_loss(student.tolist(), target.tolist(), label_smoothing)
    loss = distillation_loss(student, teacher, target, config)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    # T^2 multiplies the fp32 rounding of a small divergence too.
    assert loss.item() == pytest.approx(expected, rel=2e-5, abs=2e-6 + 3e-7 * temperature**2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 5), classes=st.integers(2, 9), num_mixed=st.integers(0, 2))
def test_bce_equals_its_twin_and_the_expressions_in_deit(seed: int, batch: int, classes: int, num_mixed: int) -> None:
    student, teacher, _ = random_batch(seed, batch, classes)
    target = F.one_hot(teacher.argmax(-1), classes).float()
    if num_mixed:
        target = 0.3 * target + 0.7 * target.roll(1, 0)
    loss = distillation_loss(student, None, target, DistillConfig(hard_loss="bce"))
    assert loss.item() == pytest.approx(twin.bce_loss(student.tolist(), target.tolist()), rel=1e-5, abs=1e-6)
    # engine.py of DeiT III rounds the targets up, main.py takes torch's criterion.
    published = torch.nn.BCEWithLogitsLoss()(student, target.gt(0.0).type(target.dtype))
    torch.testing.assert_close(loss, published)


def test_bce_is_the_hard_part_of_the_mixture_too() -> None:
    student, teacher, target = random_batch(7)
    config = DistillConfig(hard_loss="bce", hard_weight=0.25)
    soft = distillation_loss(student, teacher, target, DistillConfig())
    bce = distillation_loss(student, None, target, config)
    torch.testing.assert_close(distillation_loss(student, teacher, target, config), 0.75 * soft + 0.25 * bce)


def test_without_a_teacher_the_loss_is_the_hard_one() -> None:
    student, _, target = random_batch(0)
    loss = distillation_loss(student, None, target, DistillConfig(label_smoothing=0.1))
    assert loss.item() == pytest.approx(twin.hard_loss(student.tolist(), target.tolist(), 0.1), rel=1e-5)


def test_logits_and_log_probabilities_of_a_teacher_give_the_same_loss() -> None:
    student, teacher, target = random_batch(1)
    config = DistillConfig(temperature=3.0)
    from_logits = distillation_loss(student, teacher + 7, target, config)
    torch.testing.assert_close(from_logits, distillation_loss(student, teacher.log_softmax(-1), target, config))


def test_division_by_classes_equals_the_expression_in_deit() -> None:
    student, teacher, target = random_batch(2)
    published = F.kl_div(
        F.log_softmax(student / 3, dim=1), F.log_softmax(teacher / 3, dim=1), reduction="sum", log_target=True
    )
    config = DistillConfig(temperature=3.0, divide_by_classes=True)
    expected = published * 9 / student.numel()
    torch.testing.assert_close(distillation_loss(student, teacher, target, config), expected)


def test_soft_loss_differs_from_the_cross_entropy_in_sret_and_fkd_by_the_teachers_entropy() -> None:
    student, teacher, target = random_batch(3)
    student.requires_grad_()
    ours = distillation_loss(student, teacher, target, DistillConfig())
    # kd_loss.py of SReT and Soft_CrossEntropy of FKD: the batch mean of -sum_c p_c log q_c.
    published = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    entropy = torch.special.entr(teacher.softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(ours + entropy, published)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (ours, published))
    torch.testing.assert_close(*gradients)


def test_hard_target_is_the_cross_entropy_with_the_class_that_the_teacher_names() -> None:
    student, teacher, target = random_batch(4)
    one_hot = F.one_hot(teacher.argmax(-1), 5).tolist()
    loss = distillation_loss(student, teacher, target, DistillConfig(teacher_target="hard"))
    assert loss.item() == pytest.approx(twin.hard_loss(student.tolist(), one_hot, 0.0), rel=1e-5)


def test_classes_without_probability_give_finite_loss_and_gradient() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    loss = soft_loss(student, teacher, temperature=2.0)
    assert loss.item() == pytest.approx(4 * math.log(3 / 2))
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]) * 2)


def test_loss_is_computed_in_fp32_under_autocast_and_from_bf16() -> None:
    student, teacher, target = random_batch(5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student.bfloat16(), teacher, target, DistillConfig(hard_weight=0.5))
    rounded = student.bfloat16().float()
    assert torch.equal(loss, distillation_loss(rounded, teacher, target, DistillConfig(hard_weight=0.5)))


def test_schedules_move_linearly_and_stop_at_the_end() -> None:
    config = DistillConfig(temperature=4.0, temperature_end=1.0, hard_weight=0.2)
    values = [(config.at(ratio).temperature, config.at(ratio).hard_weight) for ratio in (0.0, 0.5, 1.0, 1.5)]
    assert values == [(4.0, 0.2), (2.5, 0.2), (1.0, 0.2), (1.0, 0.2)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature_end", float("nan")),
        ("hard_weight", 1.5),
        ("label_smoothing", 1.0),
        ("teacher_micro_batch_size", 0),
        ("teacher_target", "sfot"),
        ("hard_loss", "bec"),
        ("teacher_precision", "fp8"),
    ],
)
def test_wrong_value_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"distill\.{field}: expected"):
        DistillConfig(**{field: value})  # type: ignore[arg-type]


def test_bce_refuses_smoothed_labels() -> None:
    with pytest.raises(ValueError, match=r"distill\.label_smoothing: expected 0 with distill\.hard_loss=bce"):
        DistillConfig(hard_loss="bce", label_smoothing=0.1)
