"""At which widths an operator is timed, and how the times are made to rise with both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ocsfast.latency.sides import Side

# Of the least that may be kept: the lowest count, so that whatever is kept lies within the grid.
BELOW = 0.8


def kept_counts(side: Side, points: int, groups: int = 1, most_gone: float = 0.75) -> tuple[int, ...]:
    """The numbers of indices to time a side at: ascending, evenly spaced, the last is all of it.

    Counts are what a cut can leave: what never goes, and whole units. Between the multiples of 8 or 16
    that libraries like an operator is slower than a line from one to the next would say, so that counts
    are not rounded to these, unless the run's own kept counts are.

    Args:
        points: how many, at most.
        groups: so many go at a time.
        most_gone: the largest share that may go.
    """
    unit = side.unit * groups
    units = (side.size - side.fixed) // side.unit // groups
    least = BELOW * (1 - most_gone)
    shares = (least + (1 - least) * k / (points - 1) for k in range(points - 1))
    wanted = {max(1, round(units * share)) for share in shares}
    counts = {side.fixed + unit * n for n in wanted}
    return tuple(sorted({*(count for count in counts if count < side.size), side.size}))


def rising(times: Sequence[Sequence[float]]) -> tuple[tuple[int, ...], ...]:
    """Whole nanoseconds that rise weakly along rows and columns, near times in nanoseconds that may not.

    Each is the mean of two tables that do rise: the largest time at no more rows and columns, and the
    least at no fewer. Where the times rise already, both are the times.
    """
    given: NDArray[np.float64] = np.asarray(times, dtype=np.float64)
    above = np.maximum.accumulate(np.maximum.accumulate(given, axis=0), axis=1)
    back = given[::-1, ::-1]
    below = np.minimum.accumulate(np.minimum.accumulate(back, axis=0), axis=1)[::-1, ::-1]
    whole = np.rint((above + below) / 2).astype(np.int64)
    return tuple(tuple(int(value) for value in row) for row in whole)
