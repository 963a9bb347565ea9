"""Image classification, with a teacher or without: one label an image. B batch, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.image.augment import BatchAugment
from data_pipelines.image.normalise import Normaliser
from data_pipelines.stream.loader import Batch
from sret_scale.config.run_config import RunConfig
from sret_scale.distill import AnyTeacher, FeatureMatch, distillation_loss, student_batch
from sret_scale.model.upload import uploaded
from sret_scale.tasks.task import Inputs


class Classification:
    """Implements `task.Task`: a batch's images are augmented, and its labels mixed, as the configuration says."""

    unit = "images"
    best = "top1"
    best_in_words = "top-1"

    def __init__(
        self, config: RunConfig, *, teacher: AnyTeacher | None = None, features: FeatureMatch | None = None
    ) -> None:
        self.config, self.teacher, self.features = config, teacher, features
        self._augment = BatchAugment(config.augment, config.model.num_classes)
        self._normalise = Normaliser(config.train.image_mean, config.train.image_std)

    def inputs(self, batch: Batch, *, seed: int, device: torch.device) -> Inputs:
        pixels_BCHW, target_BC, teacher_log_probs_BC = student_batch(
            batch,
            self._augment,
            self.teacher,
            seed=seed,
            sample_seed=self.config.train.seed,
            device=device,
            teacher_input=self.config.distill.teacher_input,
        )
        return Inputs(
            model_input=self._normalise(pixels_BCHW), target=target_BC, teacher_log_probs=teacher_log_probs_BC
        )

    def loss(self, scores: Tensor, inputs: Inputs, *, progress: float, loops: int, part: slice = slice(None)) -> Tensor:
        """The loss of scores (B, C); see `distillation_loss`."""
        known_BC = None if inputs.teacher_log_probs is None else inputs.teacher_log_probs[part]
        return distillation_loss(scores, known_BC, inputs.target[part], self.config.distill.at(progress))

    def added_loss(self, *, progress: float) -> Tensor | None:
        """The loss between the features of student and teacher, weighted."""
        if self.features is None:
            return None
        return self.config.distill.at(progress).feature_weight * self.features.loss()

    def evaluation_input(self, batch: Batch, device: torch.device) -> Tensor:
        return self._normalise(batch.images.to(device, non_blocking=True))

    def counts(self, scores: Tensor, batch: Batch) -> Tensor:
        """(B, 4): 1, right at top 1, right within top 5, cross-entropy."""
        labels_B = batch.labels.to(scores.device, non_blocking=True)
        valid_B = uploaded(batch.valid, scores.device)
        top_BK = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hit_BK = (top_BK == labels_B[:, None]) & valid_B[:, None]
        loss_B = F.cross_entropy(scores, labels_B, reduction="none")
        # What a padded row gives may be no number.
        loss_B = torch.where(valid_B, loss_B.double(), 0.0)
        return torch.stack([valid_B.double(), hit_BK[:, 0].double(), hit_BK.sum(1).double(), loss_B], dim=1)

    def numbers(self, counts: list[float]) -> dict[str, float]:
        """Top-1 and top-5 accuracy and the mean cross-entropy."""
        num_samples, top1, top5, loss = counts
        return {"top1": top1 / num_samples, "top5": top5 / num_samples, "loss": loss / num_samples}
