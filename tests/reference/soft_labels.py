"""Slow, obvious twins of the soft-label record: Python floats, one row at a time."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def keep_largest(rows: Rows, top_k: int) -> list[list[float]]:
    """The `top_k` largest probabilities of each row in place; the others get an equal part of what is left."""
    kept_rows = []
    for row in rows:
        kept = sorted(range(len(row)), key=lambda c: (-row[c], c))[:top_k]
        rest = sum(p for c, p in enumerate(row) if c not in kept)
        kept_rows.append([p if c in kept else rest / (len(row) - top_k) for c, p in enumerate(row)])
    return kept_rows


def coverage(rows: Rows, decoded: Rows, labels: Sequence[int], top_k: int) -> dict[str, float]:
    """Sums over the rows: their number, kept mass, KL(row || decoded), entropy, rows whose largest is the label, and
    cosines between (1 / C - row) and (1 / C - decoded)."""
    return {
        "views": len(rows),
        "mass": sum(sum(sorted(row, reverse=True)[:top_k]) for row in rows),
        "kl": sum(
            p * math.log(p / q)
            for row, other in zip(rows, decoded, strict=True)
            for p, q in zip(row, other, strict=True)
        ),
        "entropy": -sum(p * math.log(p) for row in rows for p in row),
        "top1_agreement": sum(row.index(max(row)) == label for row, label in zip(rows, labels, strict=True)),
        "gradient_cosine": sum(_cosine(row, other) for row, other in zip(rows, decoded, strict=True)),
    }


def _cosine(row: Sequence[float], other: Sequence[float]) -> float:
    pairs = [(1 / len(row) - p, 1 / len(row) - q) for p, q in zip(row, other, strict=True)]
    return sum(a * b for a, b in pairs) / (math.hypot(*(a for a, _ in pairs)) * math.hypot(*(b for _, b in pairs)))
