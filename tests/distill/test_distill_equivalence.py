"""A student learns the same from stored labels as from the live teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.image.augment import AugmentConfig, BatchAugment, as_unit, normalise
from data_pipelines.stream.loader import LoaderState, TrainLoader
from sret_scale.distill import DistillConfig, StoredTeacher, distillation_loss, open_matching_labels, student_batch
from sret_scale.distill.label_writer import write_labels
from tests.distill.distill_shards import DATA, NUM_CLASSES, make_job, make_shards, teacher

PLAIN = AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_shards(tmp_path_factory.mktemp("shards"))


def stored(folder: Path, shards: Any, augment: AugmentConfig, **changes: Any) -> StoredTeacher:
    job = make_job(folder, shards, **changes)
    write_labels(job, rank=0, world_size=1, report=lambda text: None)
    config = DistillConfig(teacher_input="view")
    return StoredTeacher(open_matching_labels(folder, config, shards=shards, data=DATA, augment=augment, run_seed=0))


def train(shards: Any, source: Any, config: DistillConfig, augment: AugmentConfig) -> tuple[list[float], list[Tensor]]:
    """Losses and gradients of nine steps over three epochs, and so over all views."""
    torch.manual_seed(1)
    student = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(294, NUM_CLASSES))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    batch_augment = BatchAugment(augment, NUM_CLASSES)
    loader = TrainLoader(
        shards, DATA, image_size=16, seed=0, rank=0, world_size=1, micro_batch_size=8, grad_accum_steps=1
    )
    losses, gradients = [], []
    for number, step in zip(range(9), loader.steps(LoaderState()), strict=False):
        unit, target, log_probs = student_batch(
            step.micro_batches[0],
            batch_augment,
            source,
            seed=number,
            device=CPU,
            teacher_input=config.teacher_input,
        )
        loss = distillation_loss(student(normalise(as_unit(unit), (0.5,) * 3, (0.5,) * 3)), log_probs, target, config)
        parts = torch.autograd.grad(loss, list(student.parameters()))
        for parameter, part in zip(student.parameters(), parts, strict=True):
            parameter.grad = part
        optimizer.step()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return losses, gradients


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("augment", "config"),
    [
        (PLAIN, DistillConfig(teacher_input="view")),
        (PLAIN, DistillConfig(teacher_input="view", temperature=3.0, hard_weight=0.3, label_smoothing=0.1)),
        (replace(PLAIN, mixup_alpha=0.8), DistillConfig(teacher_input="view")),
        (replace(PLAIN, cutmix_alpha=1.0, erase_rate=0.5), DistillConfig(teacher_input="view", hard_weight=0.5)),
    ],
    ids=["crop-flip", "temperature-hard", "mixup", "cutmix-erase"],
)
def test_all_classes_stored_train_like_the_live_teacher(
    shards: Any, tmp_path: Path, augment: AugmentConfig, config: DistillConfig
) -> None:
    live_losses, live_gradients = train(shards, teacher(), config, augment)
    losses, gradients = train(shards, stored(tmp_path / "store", shards, augment), config, augment)
    assert losses == pytest.approx(live_losses, abs=1e-3)
    for gradient, live in zip(gradients, live_gradients, strict=True):
        assert (gradient - live).norm() < 1e-3 * live.norm()


def test_without_mixing_the_augmented_batch_is_the_view(shards: Any) -> None:
    augmented = train(shards, teacher(), DistillConfig(teacher_input="augmented"), PLAIN)
    view = train(shards, teacher(), DistillConfig(teacher_input="view"), PLAIN)
    assert augmented[0] == pytest.approx(view[0], abs=1e-6)


def frozen_student(head_scale: float) -> nn.Module:
    torch.manual_seed(1)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, NUM_CLASSES)).requires_grad_(False)
    for parameter in student.parameters():
        parameter.mul_(head_scale)
    return student


def mean_loss(shards: Any, source: Any, student: nn.Module) -> tuple[float, float]:
    """(mean loss of a student that does not learn over all views of all samples, largest range of its logits)"""
    config, augment = DistillConfig(teacher_input="view"), BatchAugment(PLAIN, NUM_CLASSES)
    loader = TrainLoader(
        shards, DATA, image_size=16, seed=0, rank=0, world_size=1, micro_batch_size=11, grad_accum_steps=1
    )
    losses, ranges = [], []
    for _, step in zip(range(6), loader.steps(LoaderState()), strict=False):
        unit, target, log_probs = student_batch(
            step.micro_batches[0], augment, source, seed=0, device=CPU, teacher_input="view"
        )
        logits = student(normalise(as_unit(unit), (0.5,) * 3, (0.5,) * 3))
        losses.append(float(distillation_loss(logits, log_probs, target, config)))
        ranges.append(float((logits.amax(1) - logits.amin(1)).max()))
    return sum(losses) / 6, max(ranges)


@pytest.mark.lengthy
@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
def test_fewer_classes_change_the_loss_by_the_kl_that_the_store_reports(
    shards: Any, tmp_path: Path, top_k: int
) -> None:
    """See "What is kept" in docs/soft_labels.md: exact where the student is even, and bounded for any student."""
    source = stored(tmp_path / "store", shards, PLAIN, top_k=top_k)
    kl, mass = source.store.coverage["kl"], source.store.coverage["mass"]
    assert kl > (1e-3 if top_k < 6 else -1e-6)
    even = frozen_student(0.0)
    live, _ = mean_loss(shards, teacher(), even)
    assert live - mean_loss(shards, source, even)[0] == pytest.approx(kl, abs=2e-4)
    uneven = frozen_student(1.0)
    live, logit_range = mean_loss(shards, teacher(), uneven)
    difference = live - mean_loss(shards, source, uneven)[0]
    bound = (2 * (1 - mass) * max(kl, 0.0)) ** 0.5 * logit_range / 2
    assert abs(difference - kl) <= bound + 5e-4 * (1 + logit_range)
    assert logit_range > 1


def test_more_classes_turn_the_gradient_towards_the_live_teachers(shards: Any, tmp_path: Path) -> None:
    config = DistillConfig(teacher_input="view")
    _, live = train(shards, teacher(), config, PLAIN)
    cosines, reported = [], []
    for top_k in (1, 2, 3, 6):
        source = stored(tmp_path / str(top_k), shards, PLAIN, top_k=top_k)
        _, gradients = train(shards, source, config, PLAIN)
        cosines.append(float(torch.cosine_similarity(gradients[0], live[0], dim=0)))
        reported.append(source.store.coverage["gradient_cosine"])
    assert cosines == sorted(cosines) and reported == sorted(reported)
    assert cosines[0] < 0.99 and cosines[-1] > 0.99999 and reported[-1] > 0.99999


def test_label_of_another_box_stops_training(shards: Any, tmp_path: Path) -> None:
    source = stored(tmp_path / "store", shards, PLAIN)
    loader = TrainLoader(
        shards, DATA, image_size=16, seed=0, rank=0, world_size=1, micro_batch_size=4, grad_accum_steps=1
    )
    batch = next(iter(loader.steps(LoaderState()))).micro_batches[0]
    assert source.probabilities(batch).shape == (4, NUM_CLASSES)
    batch.views[2, 1] += 1
    with pytest.raises(ValueError, match=rf"sample {int(batch.indices[2])} in view 0 has a label of the box"):
        source.probabilities(batch)
