"""A law for an accuracy curve: error = floor + scale * depth^-exponent, where the measurements bear one out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sret_scale.runs.metrics_log import Floats

FEWEST_DEPTHS = 4
LEAST_R2 = 0.9
EXPONENTS = np.geomspace(0.05, 3.0, 120)


@dataclass(frozen=True, kw_only=True)
class Law:
    """The best law and its residuals (measured minus fitted, as ratios). `warning` says why it must not be believed."""

    floor: float
    scale: float
    exponent: float
    r2: float
    residuals: tuple[float, ...]
    warning: str

    def error(self, depth: Floats) -> Floats:
        """The fitted error ratio at these depths."""
        return self.floor + self.scale * depth**-self.exponent

    def __str__(self) -> str:
        """The law and its warning; of one that does not fit the warning alone."""
        if not self.fits:
            return self.warning
        return (
            f"error = {100 * self.floor:.1f} % + {100 * self.scale:.3g} % x depth^-{self.exponent:.2f}, "
            f"R2 {self.r2:.2f}, largest residual {100 * max(map(abs, self.residuals)):.2f} points. {self.warning}"
        ).strip()

    @property
    def fits(self) -> bool:
        """Whether the errors fall as a power of the depth at all."""
        return self.scale > 0 and self.r2 >= LEAST_R2


def fit_law(depths: Sequence[float], errors: Sequence[float], spread: float = 0.0) -> Law | None:
    """The law of least squares with floor and scale of at least 0; None with fewer than FEWEST_DEPTHS depths.

    `spread` is how far seeds of one depth lie apart: what lies within it is noise.
    """
    depth, error = np.array(depths, dtype=np.float64), np.array(errors, dtype=np.float64)
    if len(set(depth)) < FEWEST_DEPTHS:
        return None
    best: tuple[float, float, float, float] | None = None
    for exponent in EXPONENTS:
        floor, scale = _non_negative(depth**-exponent, error)
        loss = float(np.square(floor + scale * depth**-exponent - error).sum())
        if best is None or loss < best[0]:
            best = (loss, floor, scale, float(exponent))
    assert best is not None
    loss, floor, scale, exponent = best
    total = float(np.square(error - error.mean()).sum())
    r2 = 1.0 - loss / total if total > 0 else 0.0
    residuals = error - (floor + scale * depth**-exponent)
    law = Law(floor=floor, scale=scale, exponent=exponent, r2=r2, residuals=tuple(residuals.tolist()), warning="")
    warning = ""
    if not law.fits:
        warning = "No power law of the depth fits: error does not fall steadily as depth grows."
    elif float(error.max() - error.min()) <= spread:
        warning = "The depths differ by less than their seeds do: the fitted law says nothing."
    elif len(set(depth)) == FEWEST_DEPTHS:
        warning = f"A law of 3 numbers through {FEWEST_DEPTHS} depths: do not extend it."
    return replace(law, warning=warning)


def _non_negative(basis: Floats, error: Floats) -> tuple[float, float]:
    """(floor, scale) of least squares, both at least 0."""
    floor, scale = np.linalg.lstsq(np.stack([np.ones_like(basis), basis], axis=1), error, rcond=None)[0]
    if scale < 0:
        return float(error.mean()), 0.0
    if floor < 0:
        return 0.0, float(basis @ error / (basis @ basis))
    return float(floor), float(scale)
