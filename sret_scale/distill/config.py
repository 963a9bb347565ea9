"""What a run may choose about its teacher and its loss."""

import dataclasses
from typing import Literal

from data_pipelines.field_checks import check_fields
from sret_scale.distill.spec import parse_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Teacher and loss of a run. Without a teacher the loss is the hard one, with its label smoothing.

    The defaults are those of SReT (section 4.1 of arXiv 2111.05297), MEAL V2 and FKD: soft labels alone, T = 1.
    Values with an `_end` change linearly over the run, from the plain name's to it.

    temperature: divides the teacher's and the student's scores before their softmax.
    temperature_end, hard_weight_end, feature_weight_end: the value at the run's end; null: the same throughout.
    teacher_compile: whether the teacher runs through torch.compile.
    """

    teacher: str | None = None
    """Where the teacher comes from, e.g. `run:runs/teacher`; several joined with `+` are averaged."""
    temperature: float = 1.0
    temperature_end: float | None = None
    hard_weight: float = 0.0
    """Weight of the ground truth; the teacher has the rest. DeiT's alpha is 1 - hard_weight."""
    hard_weight_end: float | None = None
    hard_loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """`bce` is DeiT III's: each class is present or absent, and both classes of a mixed image are present."""
    feature_weight: float = 0.0
    """Of the cosine loss between the features of student and teacher, which is added to the others."""
    feature_weight_end: float | None = None
    teacher_target: Literal["soft", "hard"] = "soft"
    """Learn the teacher's distribution, or the class that it names (DeiT's hard distillation)."""
    teacher_input: Literal["augmented", "view"] = "augmented"
    """What the teacher is asked about: the very batch that the student sees, or the crop and flip alone, its
    probabilities then mixed like the labels. Stored labels are of views."""
    label_smoothing: float = 0.0
    """Of the ground truth only. Losses of grids and texts have it too, in training."""
    divide_by_classes: bool = False
    """DeiT's published code divides its KL by the number of classes too; needed only to repeat its numbers."""
    teacher_micro_batch_size: int | None = None
    """Images in one pass of the teacher; None is the student's micro batch."""
    teacher_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto` is bf16 on a GPU and fp32 on a CPU, where bf16 convolutions are slow without special instructions."""
    teacher_placement: Literal["replicated", "sharded"] = "replicated"
    """Whole on every rank, or, when too large for one device, cut over all ranks (ZeRO 3)."""
    teacher_compile: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "above 0": "temperature temperature_end",
            "0 to 1": "hard_weight hard_weight_end",
            "0 or more": "feature_weight feature_weight_end",
            "0 or more and less than 1": "label_smoothing",
            "at least 1": "teacher_micro_batch_size",
        }
        check_fields(self, "distill", bounds)
        if self.hard_loss == "bce" and self.label_smoothing:
            raise ValueError(
                f"distill.label_smoothing: expected 0 with distill.hard_loss=bce, where every smoothed class would "
                f"count as present, got {self.label_smoothing}"
            )
        if self.teacher_compile and self.teacher_placement == "sharded":
            raise ValueError(
                "distill.teacher_compile: does not work with distill.teacher_placement=sharded; change one of the two"
            )
        if self.matches_features:
            self._require_features()

    @property
    def matches_features(self) -> bool:
        """Whether the cosine loss counts at any time of the run."""
        return self.feature_weight > 0 or bool(self.feature_weight_end)

    def _require_features(self) -> None:
        """ValueError unless one live teacher sees the student's own images whole on this device."""
        kinds = [part.kind for part in parse_teacher(self.teacher)] if self.teacher else []
        if len(kinds) != 1 or kinds == ["labels"]:
            raise ValueError(
                f"distill.feature_weight: expected one live teacher, whose features can be seen, got {self.teacher!r}; "
                "set it to 0, or choose one network as distill.teacher"
            )
        for name, needed in (
            ("teacher_input", "augmented"),
            ("teacher_placement", "replicated"),
            ("teacher_compile", False),
        ):
            if getattr(self, name) != needed:
                raise ValueError(f"distill.feature_weight: needs distill.{name}={needed}, got {getattr(self, name)}")

    def at(self, progress_ratio: float) -> "DistillConfig":
        """The config at a point of the run, 0 at its start and 1 at its end, with the scheduled values filled in."""

        def between(start: float, end: float | None) -> float:
            return start if end is None else start + (end - start) * min(max(progress_ratio, 0.0), 1.0)

        return dataclasses.replace(
            self,
            temperature=between(self.temperature, self.temperature_end),
            hard_weight=between(self.hard_weight, self.hard_weight_end),
            feature_weight=between(self.feature_weight, self.feature_weight_end),
        )
