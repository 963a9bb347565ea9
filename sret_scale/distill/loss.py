"""Losses between a student, its teacher and the ground truth.

All are pure functions, computed in fp32 whatever the inputs or an active autocast say, and averaged over the batch.
Shapes: B batch, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.distill.config import DistillConfig


def soft_loss(student_logits_BC: Tensor, teacher_log_probs_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 / B * sum_bc p_bc (log p_bc - log q_bc), with p = softmax(teacher / T) and q = softmax(student / T).

    The KL divergence of Hinton et al. (arXiv 1503.02531, section 2): T^2 keeps the size of its gradient when T
    changes. At T = 1 its gradient is that of the soft cross-entropy in MEAL V2, FKD and SReT, from which it differs
    by the teacher's entropy. A class with p = 0 adds nothing, so teacher log-probabilities of -inf are allowed.
    """
    teacher_BC = F.log_softmax(teacher_log_probs_BC.float() / temperature, dim=-1)
    student_BC = F.log_softmax(student_logits_BC.float() / temperature, dim=-1)
    p_BC = teacher_BC.exp()
    terms_BC = torch.where(p_BC > 0, p_BC * (teacher_BC - student_BC), 0.0)
    return terms_BC.sum(dim=-1).mean() * temperature**2


def hard_loss(student_logits_BC: Tensor, target_BC: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-1 / B * sum_bc y'_bc log q_bc, with y' = (1 - e) y + e / C.

    Cross-entropy with the label smoothing of Szegedy et al. (arXiv 1512.00567, section 7). `target_BC` holds
    probabilities: one-hot, or mixed by mixup or cutmix.
    """
    return F.cross_entropy(student_logits_BC.float(), target_BC.float(), label_smoothing=label_smoothing)


def bce_loss(student_logits_BC: Tensor, target_BC: Tensor) -> Tensor:
    """-1 / (B C) * sum_bc [y_bc log s_bc + (1 - y_bc) log(1 - s_bc)], with s = sigmoid and y = 1 where target > 0.

    DeiT III (arXiv 2204.07118, section 3.1, after arXiv 2110.00476, section 4.2) asks about each class by itself. Its
    code rounds every target above 0 up to 1, so that both classes of an image mixed by mixup or cutmix are present.
    """
    return F.binary_cross_entropy_with_logits(student_logits_BC.float(), (target_BC > 0).float())


def teacher_class_loss(student_logits_BC: Tensor, teacher_log_probs_BC: Tensor) -> Tensor:
    """-1 / B * sum_b log q_b,argmax(teacher_b): DeiT's hard distillation (arXiv 2012.12877, equation 3)."""
    return F.cross_entropy(student_logits_BC.float(), teacher_log_probs_BC.argmax(dim=-1))


def distillation_loss(
    student_logits_BC: Tensor, teacher_log_probs_BC: Tensor | None, target_BC: Tensor, config: DistillConfig
) -> Tensor:
    """(1 - w) * teacher's loss + w * hard loss, with w = `hard_weight`; the hard loss alone without a teacher.

    The mixture is DeiT's (arXiv 2012.12877, equation 2), on one set of logits: SReT has no distillation token.
    `teacher_log_probs_BC` are log-probabilities at T = 1 or logits, which is the same to a softmax.
    `divide_by_classes` divides the soft loss by C, as `losses.py` of DeiT does with `/ outputs_kd.numel()`.
    """
    with torch.autocast(student_logits_BC.device.type, enabled=False):
        if teacher_log_probs_BC is None:
            return ground_truth_loss(student_logits_BC, target_BC, config)
        if config.teacher_target == "hard":
            loss = teacher_class_loss(student_logits_BC, teacher_log_probs_BC)
        else:
            loss = soft_loss(student_logits_BC, teacher_log_probs_BC, config.temperature)
            if config.divide_by_classes:
                loss = loss / student_logits_BC.shape[-1]
        if config.hard_weight == 0:
            return loss
        hard = ground_truth_loss(student_logits_BC, target_BC, config)
        return (1 - config.hard_weight) * loss + config.hard_weight * hard


def ground_truth_loss(student_logits_BC: Tensor, target_BC: Tensor, config: DistillConfig) -> Tensor:
    """The loss against the labels that the configuration names."""
    if config.hard_loss == "bce":
        return bce_loss(student_logits_BC, target_BC)
    return hard_loss(student_logits_BC, target_BC, config.label_smoothing)
