"""How healthy the depth of a model in training is: a probe at intervals, its record, and alarms in plain sentences."""

from sret_scale.config.telemetry_config import TelemetryConfig
from sret_scale.train.telemetry.record import Telemetry, telemetry_of

__all__ = ["Telemetry", "TelemetryConfig", "telemetry_of"]
