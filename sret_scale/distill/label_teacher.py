"""Stored labels in the place of a teacher, and what the student learns from in one batch."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.image.augment import AugmentConfig, BatchAugment, as_unit
from data_pipelines.labels.records import decode_records, record_views
from data_pipelines.labels.store import LabelStore, check_labels, open_labels
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.prefetch import Batch
from sret_scale.distill.config import DistillConfig
from sret_scale.distill.teacher import Teacher


class StoredTeacher:
    """A store of soft labels: `teacher.probabilities(batch)` instead of `teacher(unit_BCHW)`."""

    def __init__(self, store: LabelStore) -> None:
        self.store = store

    def probabilities(self, batch: Batch, device: torch.device | str = "cpu") -> Tensor:
        """Probabilities (B, C), fp32, of the views in the batch. ValueError for a label of another view."""
        indices_B = batch.indices.numpy()
        records = self.store.read(indices_B, batch.view_numbers.numpy())
        found_B5, expected_B5 = record_views(records), batch.views.numpy()
        if not np.array_equal(found_B5, expected_B5):
            row = int(np.flatnonzero((found_B5 != expected_B5).any(axis=1))[0])
            raise ValueError(
                f"{self.store.folder}: sample {indices_B[row]} in view {int(batch.view_numbers[row])} has a label of "
                f"the box {found_B5[row].tolist()}, the image was cut at {expected_B5[row].tolist()};"
                " write the labels again"
            )
        return decode_records(records, self.store.plan.num_classes, device)


AnyTeacher = Teacher | StoredTeacher
"""Where a student's soft labels come from: a network, or files."""


def open_matching_labels(
    folder: Path,
    config: DistillConfig,
    *,
    shards: ShardSet,
    data: DataConfig,
    augment: AugmentConfig,
    run_seed: int,
) -> LabelStore:
    """The store in a folder, without reading its labels; ValueError or OSError where it does not belong to the run."""
    store = open_labels(folder)
    check_labels(store, shards, data, run_seed)
    if config.teacher_input == "augmented" and changes_views(augment):
        raise ValueError(
            f"{folder}: holds labels of plain views, but distill.teacher_input=augmented asks about augmented images; "
            "set distill.teacher_input=view, which mixes the stored labels like the hard ones"
        )
    return store


def changes_views(augment: AugmentConfig) -> bool:
    """Whether the student sees anything but crop and flip."""
    names = ("randaugment_ops", "three_augment_rate", "color_jitter", "erase_rate", "mixup_alpha", "cutmix_alpha")
    return any(getattr(augment, name) for name in names)


def student_batch(
    batch: Batch,
    augment: BatchAugment,
    teacher: AnyTeacher | None,
    *,
    seed: int,
    device: torch.device,
    teacher_input: str,
    sample_seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(pixels_BCHW, target_BC, teacher_log_probs_BC or None) of a batch after augmentation, on the device.

    Pixels are float32 in [0, 1], or uint8 (`BatchAugment.pixels`). seed: of mixing; sample_seed, with sample and view:
    of all else.
    """
    images_BCHW = batch.images.to(device, non_blocking=True)
    labels_B = batch.labels.to(device, non_blocking=True)
    places = zip(batch.view_numbers.tolist(), batch.indices.tolist(), strict=True)
    keys = [(sample_seed, *place) for place in places]
    if teacher is None or (teacher_input == "augmented" and not isinstance(teacher, StoredTeacher)):
        pixels_BCHW, target_BC = augment.pixels(images_BCHW, labels_B, seed=seed, keys=keys)
        return pixels_BCHW, target_BC, None if teacher is None else teacher(as_unit(pixels_BCHW))
    if isinstance(teacher, StoredTeacher):
        probs_BC = teacher.probabilities(batch, device)
    else:
        probs_BC = teacher(images_BCHW.float() / 255).softmax(dim=-1)
    # Side by side, so that one call mixes the images, the hard labels and the teacher's in the same way.
    one_hot_BC = torch.nn.functional.one_hot(labels_B, augment.num_classes).float()
    both = torch.cat([one_hot_BC, probs_BC], dim=1)
    pixels_BCHW, both = augment.pixels(images_BCHW, both, seed=seed, keys=keys)
    target_BC, probs_BC = both[:, : augment.num_classes], both[:, augment.num_classes :]
    return pixels_BCHW, target_BC, probs_BC.log()
