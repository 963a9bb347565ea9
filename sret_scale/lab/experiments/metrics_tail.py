"""How far a run is, from the end of its metrics file: cheap enough to ask of many running runs all the time."""

from dataclasses import dataclass
from pathlib import Path

from sret_scale.runs.metrics_log import number, parse_line

TAIL_BYTES = 8192
# The number that an evaluation is best in, of each task.
BEST = ("top1", "exact", "saved")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The newest training line, and the newest accuracy near it; None where there is none yet."""

    images: int = 0
    loss: float | None = None
    images_per_s: float | None = None
    top1: float | None = None

    def remaining_s(self, total_images: int) -> float | None:
        """Seconds to the end at the present speed."""
        if self.images >= total_images:
            return 0.0
        return (total_images - self.images) / self.images_per_s if self.images_per_s else None


def standing_of(folder: Path) -> Standing:
    """Where the run of this folder stands; a line that is half written, or no metric at all, is passed over."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return Standing()
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        lines = stream.read().split(b"\n")
    train, evaluation = None, None
    for raw in reversed(lines):
        line = parse_line(raw)
        kind = line["kind"] if line else None
        if kind == "train" and train is None:
            train = line
        if kind == "eval" and evaluation is None:
            evaluation = line
        if train is not None and evaluation is not None:
            break
    return Standing(
        images=_count((train or {}).get("images")),
        loss=_finite((train or {}).get("loss")),
        images_per_s=_finite((train or {}).get("images_per_s")),
        top1=_finite(next((evaluation[name] for name in BEST if name in evaluation), None) if evaluation else None),
    )


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) and not isinstance(value, bool) else 0


def _finite(value: object) -> float | None:
    found = number(value)
    return found if found == found else None
