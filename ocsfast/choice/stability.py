"""Stability of the partition, Eq. 4-6, over the Jaccard indices of Eq. 3.

`indices` holds J(M_{t-lag}, M_t) check by check. The first one exists at check lag + 1, because it
compares with the partition `lag` checks before.
"""

from __future__ import annotations

from collections.abc import Sequence


def mean_stability(indices: Sequence[float], window: int, back: int = 0) -> float | None:
    """Eq. 4, `back` checks ago: the mean of the last `window` indices, or of as many as exist.

    None if none existed then.
    """
    end = len(indices) - back
    recent = indices[max(0, end - window) : max(0, end)]
    return sum(recent) / len(recent) if recent else None


def has_settled(indices: Sequence[float], window: int, tau: float) -> bool:
    """Eq. 5: the mean stability no longer rises by more than `tau` over `window` checks.

    False until the earlier mean has a term, that is before `window + lag + 1` checks.
    """
    now = mean_stability(indices, window)
    before = mean_stability(indices, window, back=window)
    return now is not None and before is not None and now - before <= tau


def is_stable(indices: Sequence[float], window: int, epsilon: float) -> bool:
    """Eq. 6: the mean over a full window is at least 1 - epsilon."""
    now = mean_stability(indices, window)
    return now is not None and len(indices) >= window and now >= 1 - epsilon
