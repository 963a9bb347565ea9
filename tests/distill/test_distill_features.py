"""The cosine loss on features: its value, its projection, and what it is refused with."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data_pipelines.image.augment import AugmentConfig
from data_pipelines.stream.prefetch import Batch
from sret_scale.config.run_config import RunConfig, TrainConfig
from sret_scale.distill import DistillConfig, FeatureMatch, build_teacher
from sret_scale.distill.features import classifier_of, feature_loss, semi_orthogonal
from sret_scale.distill.networks import Network
from sret_scale.distill.teacher import OnlineTeacher
from sret_scale.model import SReT
from sret_scale.tasks.classification import Classification
from sret_scale.train.assemble import match_features
from sret_scale.train.step import Moment, micro_batch_loss
from tests.reference import losses as twin
from tests.tiny import TINY_MODEL


def random_features(seed: int, batch: int, width: int) -> torch.Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), width=st.integers(1, 9), teacher_width=st.integers(1, 9))
def test_loss_equals_its_twin(seed: int, batch: int, width: int, teacher_width: int) -> None:
    student, teacher = random_features(seed, batch, width), random_features(seed + 1, batch, teacher_width)
    projection = semi_orthogonal(teacher_width, width)
    expected = twin.feature_loss(student.tolist(), teacher.tolist(), projection.tolist())
    assert feature_loss(student, teacher, projection).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_at_equal_widths_it_is_the_criterion_of_distilbert() -> None:
    student, teacher = random_features(0, 5, 8), random_features(1, 5, 8)
    published = nn.CosineEmbeddingLoss()(student, teacher, torch.ones(5))
    torch.testing.assert_close(feature_loss(student, teacher, semi_orthogonal(8, 8)), published)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (64, 16)])
def test_projection_is_semi_orthogonal_and_always_the_same(rows: int, columns: int) -> None:
    matrix = semi_orthogonal(rows, columns)
    assert torch.equal(matrix, semi_orthogonal(rows, columns))
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(min(rows, columns)), atol=1e-6, rtol=0)


def test_narrow_teacher_keeps_all_its_angles_and_a_wide_one_most_of_them() -> None:
    pair = random_features(2, 2, 5)
    cosine = torch.cosine_similarity(pair[0], pair[1], dim=0)
    projected = pair @ semi_orthogonal(5, 12)
    torch.testing.assert_close(torch.cosine_similarity(projected[0], projected[1], dim=0), cosine)
    wide = random_features(3, 40, 512)
    before, after = (torch.cosine_similarity(x[:20], x[20:] + x[:20]) for x in (wide, wide @ semi_orthogonal(512, 128)))
    assert (before - after).abs().max() < 0.25


def small_teacher() -> tuple[nn.Sequential, tuple[float, ...], tuple[float, ...], int]:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)), (0.5,) * 3, (0.5,) * 3, 2


def no_runs(folder: object) -> Any:
    raise AssertionError(folder)


def test_match_compares_what_both_classifiers_saw_over_all_micro_batches() -> None:
    spec = f"module:{__name__}:small_teacher"
    teacher = build_teacher(spec, num_classes=3, device="cpu", load_run=no_runs, micro_batch_size=2)
    assert isinstance(teacher, OnlineTeacher)
    body, network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh()), small_teacher()[0]
    student = nn.Sequential(body, nn.Linear(4, 3))
    match = FeatureMatch(student, teacher.module, num_classes=3, teacher_name=spec)
    for seed in (0, 1):
        unit = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        teacher(unit)
        student(unit[:2])
        student(unit)
        loss = match.loss()
        expected = feature_loss(body(unit), network[:3]((unit - 0.5) / 0.5), semi_orthogonal(9, 4))
        torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, list(body.parameters())[:1])
    assert gradient.norm() > 0


def test_student_learns_the_teachers_features() -> None:
    teacher = small_teacher()[0].requires_grad_(False)
    student = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 9), nn.LayerNorm(9), nn.Linear(9, 3)
    )
    match = FeatureMatch(student, teacher, num_classes=3, teacher_name="small")
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    unit = torch.rand(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        teacher(unit)
        student(unit)
        loss = match.loss()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher 'x' has no linear layer of 3 outputs.*feature_weight=0"):
        classifier_of(nn.Conv2d(3, 3, 1), 3, "teacher 'x'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "expected one live teacher"),
        ({"teacher": "labels:store"}, "expected one live teacher"),
        ({"teacher": "run:a+run:b"}, "expected one live teacher"),
        ({"teacher_input": "view"}, r"needs distill\.teacher_input=augmented, got view"),
        ({"teacher_placement": "sharded"}, r"needs distill\.teacher_placement=replicated"),
        ({"teacher_compile": True}, r"needs distill\.teacher_compile=False"),
        ({"feature_weight": -1.0}, "expected 0 or more, got -1"),
    ],
)
@pytest.mark.parametrize("name", ["feature_weight", "feature_weight_end"])
def test_what_has_no_features_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    fields = {"teacher": "run:teacher", name: 0.5}
    assert DistillConfig(**fields).matches_features  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{**fields, **change})


def test_weight_moves_linearly() -> None:
    config = DistillConfig(teacher="run:teacher", feature_weight=1.0, feature_weight_end=0.0)
    assert [config.at(ratio).feature_weight for ratio in (0.0, 0.25, 1.0, 2.0)] == [1.0, 0.75, 0.0, 0.0]


def test_a_step_of_training_adds_the_weighted_features_to_the_loss() -> None:
    config = RunConfig(
        model=TINY_MODEL,
        augment=AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0),
        distill=DistillConfig(teacher="module:x:y", feature_weight=2.0, feature_weight_end=0.0),
        train=TrainConfig(total_images=100),
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 40), nn.Linear(40, 10))
    parts = Network(module=network, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=28)
    teacher = OnlineTeacher("x", parts, device=torch.device("cpu"), micro_batch_size=2, precision="fp32")
    student = SReT(TINY_MODEL)
    batch = Batch(
        images=torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8),
        labels=torch.tensor([0, 1, 2]),
        indices=torch.arange(3),
        valid=torch.ones(3, dtype=torch.bool),
        views=torch.zeros(3, 5, dtype=torch.int32),
        view_numbers=torch.zeros(3, dtype=torch.int32),
    )

    def loss_at(config: RunConfig, progress: float) -> float:
        task = Classification(config, teacher=teacher, features=match_features(config, student, teacher))
        moment = Moment(seed=0, step=0, micro_step=0, rank=0, progress=progress)
        inputs = task.inputs(batch, seed=moment.seed_for("augment"), device=torch.device("cpu"))
        return micro_batch_loss(student.eval(), task, inputs, moment, config=config, plans=None).item()

    start, middle, end = (loss_at(config, progress) for progress in (0.0, 0.5, 1.0))
    assert start - middle == pytest.approx(middle - end, rel=1e-3)
    assert 0.5 < start - end < 3.5
    plain = replace(config, distill=DistillConfig(teacher="module:x:y"))
    assert match_features(plain, student, teacher) is None
    assert loss_at(plain, 0.0) == pytest.approx(end, rel=1e-6)
