"""Numbers as people read them: counts, bytes, percentages and times with units, and how many of a row are shown."""

import math

MISSING = "\N{EN DASH}"
_THOUSANDS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_BINARY = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def compact(value: float | None) -> str:
    """A count to three digits: 4755979 -> `4.76 M`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _scaled(value, _THOUSANDS, "")


def binary_size(value: float | None) -> str:
    """A number of bytes to three digits: 536870912 -> `512 MiB`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _scaled(value, _BINARY, " B")


def _scaled(value: float, units: tuple[tuple[str, float], ...], plain: str) -> str:
    for name, size in units:
        # 999.5 would round to 1000 of the smaller unit.
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)} {name}"
    return f"{_three_digits(value)}{plain}"


def _three_digits(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    value = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def grouped(value: float | None) -> str:
    """A whole number with its thousands apart: 26000 -> `26,000`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def percent(ratio: float | None) -> str:
    """A ratio as a percentage with one decimal; `NaN` is said, not hidden."""
    if ratio is None:
        return MISSING
    return f"{100 * ratio:.1f}" if math.isfinite(ratio) else "NaN"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 429 -> `7 min 09 s`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, spread evenly, first and last included."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / max(1, most - 1)) for place in range(most)})
