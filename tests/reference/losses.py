"""Slow, obvious twins of the distillation losses: Python floats, one class at a time."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities of scores."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def soft_loss(student: Rows, teacher: Rows, temperature: float) -> float:
    """Batch mean of KL(teacher || student), both softened by the temperature, times its square."""
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        q = softmax([score / temperature for score in student_row])
        p = softmax([score / temperature for score in teacher_row])
        total += sum(p_c * math.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True) if p_c > 0)
    return temperature**2 * total / len(student)


def hard_loss(student: Rows, target: Rows, label_smoothing: float) -> float:
    """Batch mean of the cross-entropy with smoothed targets."""
    total = 0.0
    for student_row, target_row in zip(student, target, strict=True):
        for q_c, y_c in zip(softmax(student_row), target_row, strict=True):
            smoothed = (1 - label_smoothing) * y_c + label_smoothing / len(target_row)
            total -= smoothed * math.log(q_c)
    return total / len(student)


def bce_loss(student: Rows, target: Rows) -> float:
    """Mean over images and classes of the cross-entropy between "present" and "absent"."""
    terms = []
    for student_row, target_row in zip(student, target, strict=True):
        for score, share in zip(student_row, target_row, strict=True):
            present = 1 / (1 + math.exp(-score))
            terms.append(-math.log(present if share > 0 else 1 - present))
    return sum(terms) / len(terms)


def feature_loss(student: Rows, teacher: Rows, projection: Rows) -> float:
    """Batch mean of one minus the cosine between the student's features and the teacher's projected ones."""
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        projected = [
            sum(value * row[column] for value, row in zip(teacher_row, projection, strict=True))
            for column in range(len(student_row))
        ]
        dot = sum(a * b for a, b in zip(student_row, projected, strict=True))
        total += 1 - dot / (math.hypot(*student_row) * math.hypot(*projected))
    return total / len(student)
