"""The cosine loss between what a student's and its teacher's classifiers see.

Features are the input of a network's last linear layer with an output for each class: after the final norm and the
pooling, whatever the architecture. Shapes: B batch, D the student's width, E the teacher's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def feature_loss(student_BD: Tensor, teacher_BE: Tensor, projection_ED: Tensor) -> Tensor:
    """1 / B * sum_b (1 - cos(student_b, teacher_b P)), in fp32.

    The cosine loss on hidden states of DistilBERT (arXiv 1910.01108, section 3), whose widths are equal. Here P is
    fixed, not learned: see `semi_orthogonal`.
    """
    with torch.autocast(student_BD.device.type, enabled=False):
        return 1 - F.cosine_similarity(student_BD.float(), teacher_BE.float() @ projection_ED, dim=-1).mean()


def semi_orthogonal(num_rows: int, num_columns: int) -> Tensor:
    """A fixed matrix (rows, columns) with orthonormal rows or columns; the identity where both are equal.

    A student may hold its features in any rotated form, since the head behind them is learned. So a teacher of at most
    the student's width loses nothing, and a wider one keeps its angles in expectation (Johnson and Lindenstrauss,
    1984). A learned matrix would have to be trained, sharded and saved beside the student, for what its own last norm
    and blocks can do.
    """
    if num_rows == num_columns:
        return torch.eye(num_rows)
    generator = torch.Generator().manual_seed(0)
    shape = max(num_rows, num_columns), min(num_rows, num_columns)
    q, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return (q if num_rows > num_columns else q.T).float().contiguous()


def classifier_of(module: nn.Module, num_classes: int, name: str) -> nn.Linear:
    """The last linear layer with an output for each class; ValueError where there is none."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features == num_classes]
    if not layers:
        raise ValueError(
            f"{name} has no linear layer of {num_classes} outputs whose input could be its features; "
            "set distill.feature_weight=0, or take another teacher"
        )
    return layers[-1]


class FeatureMatch:
    """Watches both classifiers; `loss()` compares what they saw of the last batch."""

    def __init__(self, student: nn.Module, teacher: nn.Module, *, num_classes: int, teacher_name: str) -> None:
        ours = classifier_of(student, num_classes, "the student")
        theirs = classifier_of(teacher, num_classes, f"teacher {teacher_name!r}")
        self._student_BD: Tensor | None = None
        # Of the micro-batches of one batch, in their order.
        self._teacher_parts: list[Tensor] = []
        ours.register_forward_pre_hook(self._see_student)
        theirs.register_forward_pre_hook(lambda _, inputs: self._teacher_parts.append(inputs[0]))
        self._projection_ED = semi_orthogonal(theirs.in_features, ours.in_features).to(ours.weight.device)

    def _see_student(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        # The last pass counts: telemetry may look at a part of the batch before the step's own pass.
        self._student_BD = inputs[0]

    def loss(self) -> Tensor:
        """The mean over the batch that the teacher, and after it the student, have just been given."""
        assert self._student_BD is not None, "the student was not asked"
        # Concatenated outside inference mode: autograd refuses to save an inference tensor.
        loss = feature_loss(self._student_BD, torch.cat(self._teacher_parts), self._projection_ED)
        self._student_BD = None
        self._teacher_parts.clear()
        return loss
