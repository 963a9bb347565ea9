"""When a run looks at the health of its depth, and on how many images."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Changes no bit of a run. Needs whole parameters on a rank: at ZeRO 3 there is none."""

    interval_steps: int = 200
    """Steps from one probe to the next, the first one at step 0; 0 makes none."""
    num_images: int = 2
    """Images of rank 0's micro-batch that a probe uses; their boundaries of all applications are in memory at once."""

    def __post_init__(self) -> None:
        if self.interval_steps < 0:
            raise ValueError(f"telemetry.interval_steps: expected 0 or more, got {self.interval_steps}")
        if self.num_images < 1:
            raise ValueError(f"telemetry.num_images: expected at least 1, got {self.num_images}")
