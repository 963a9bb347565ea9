"""What an analysis looks at: a run's model with its newest weights, and a fixed set of its test images in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.image.augment import normalise
from data_pipelines.stream.loader import evaluation_batches
from sret_scale.model import SReT
from sret_scale.train.evaluate_main import open_shards, require_classes
from sret_scale.train.load_run import load_model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model in eval mode and the first images of its test set, normalised. B micro-batch, C classes."""

    name: str
    model: SReT
    batches: tuple[tuple[Tensor, Tensor], ...]

    @property
    def num_images(self) -> int:
        """How many images the batches have."""
        return sum(len(labels_B) for _, labels_B in self.batches)


def open_subject(run: Path, num_images: int, report: Callable[[str], None]) -> Subject:
    """The model of a run, with its average where it keeps one, on the first `num_images` of its test set.

    Raises FileNotFoundError or ValueError for a folder that is no run, or has no checkpoint or test images.
    """
    if num_images < 1:
        raise ValueError(f"--images: expected at least 1, got {num_images}")
    shards, config = open_shards(run, None)
    require_classes(config, run)
    model, weights, step = load_model(run, None, report)
    report(f"{run}: {weights} weights of step {step}, {config.model.num_applications} applications")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches, count = [], 0
    for batch in evaluation_batches(
        shards,
        config.data,
        image_size=config.model.image_size,
        batch_size=min(config.train.micro_batch_size, num_images),
        rank=0,
        world_size=1,
    ):
        valid_B = batch.valid.clone()
        valid_B[max(0, num_images - count) :] = False
        images_BCHW = normalise(batch.images[valid_B].float() / 255, config.train.image_mean, config.train.image_std)
        batches.append((images_BCHW.to(device), batch.labels[valid_B].to(device)))
        count += int(valid_B.sum())
        if count >= num_images:
            break
    return Subject(name=run.resolve().name, model=model.to(device), batches=tuple(batches))


@torch.inference_mode()
def measure(model: nn.Module, subject: Subject) -> tuple[float, float]:
    """(mean cross-entropy, top-1 ratio) on the subject's images; NaN for a loss that is not finite."""
    loss, right = 0.0, 0
    for images_BCHW, labels_B in subject.batches:
        logits_BC = model(images_BCHW).float()
        loss += float(F.cross_entropy(logits_BC, labels_B, reduction="sum"))
        right += int((logits_BC.argmax(dim=1) == labels_B).sum())
    return loss / subject.num_images, right / subject.num_images
