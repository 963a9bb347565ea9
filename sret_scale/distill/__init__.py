"""Distillation: where a teacher's outputs come from, and the losses that learn from them."""

from sret_scale.distill.config import DistillConfig
from sret_scale.distill.features import FeatureMatch
from sret_scale.distill.label_teacher import AnyTeacher, StoredTeacher, open_matching_labels, student_batch
from sret_scale.distill.loss import distillation_loss, hard_loss, soft_loss
from sret_scale.distill.spec import stored_labels
from sret_scale.distill.teacher import OnlineTeacher, Teacher, build_teacher

__all__ = [
    "AnyTeacher",
    "DistillConfig",
    "FeatureMatch",
    "OnlineTeacher",
    "StoredTeacher",
    "Teacher",
    "build_teacher",
    "distillation_loss",
    "hard_loss",
    "open_matching_labels",
    "soft_loss",
    "stored_labels",
    "student_batch",
]
