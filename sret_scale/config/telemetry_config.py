"""When a run looks at the health of its depth, and on how many images."""

from dataclasses import dataclass

from data_pipelines.field_checks import check_fields


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Changes no bit of a run. Needs whole parameters on a rank: at ZeRO 3 there is none."""

    interval_steps: int = 200
    """Steps from one probe to the next, the first one at step 0; 0 makes none."""
    num_images: int = 2
    """Images of rank 0's micro-batch that a probe uses; their boundaries of all applications are in memory at once."""

    def __post_init__(self) -> None:
        check_fields(self, "telemetry", {"0 or more": "interval_steps", "at least 1": "num_images"})
