"""The planned sparsity-learning stage: when it begins at the latest, how long it takes, when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ocsfast.core.config import Config


@dataclass(frozen=True)
class Stage:
    """The planned sparsity-learning stage, in optimizer steps of the whole run."""

    earliest_start: int
    latest_start: int
    steps: int
    deadline: int | None


def plan_stage(
    config: Config, total: int | None, start: int | None, checks: int, steps: int, begun: int = 0
) -> Stage:
    """Plan the stage from what is known now.

    Args:
        total: optimizer steps of the whole run, or None if nothing tells.
        start: step at which the stage began, or None before that.
        checks, steps: how many of each have been seen.
        begun: step from which on there could be checks.

    With `total`: Eq. 5 may begin the stage after `observe` of it. The stage takes `span` of it, less
    where the deadline is nearer, and begins at the latest `span` before the deadline, so that groups are
    never cut at full size because Eq. 5 took its time. Where checks begin too late for that, a deadline
    that is a share of the run waits for half of the stage, or of what is left of the run. Without
    `total`: the stage begins at the latest after four times the checks that Eq. 5 needs, takes as many
    steps as were observed before it, and the deadline follows after the same again.
    """
    interval = max(1, (steps - begun) // max(1, checks))
    needed = config.window + config.lag + 1
    length = round(config.span * total) if total is not None else (start or steps)
    length = max(length, interval)
    if isinstance(config.deadline, int):
        deadline: int | None = config.deadline * interval
    elif config.deadline is None or total is None:
        deadline = None
    else:
        deadline = round(config.deadline * total)
        if config.strength == "auto":
            begin = steps if start is None else start
            least = min(max(interval, length // 2), (total - begin) // 2)
            deadline = max(deadline, begin + least)
    if deadline is not None:
        latest = deadline - length
        if start is not None:
            length = max(interval, min(length, deadline - start))
    else:
        latest = 4 * needed * interval if total is None else total - length
        if start is not None and total is None and config.deadline is not None:
            deadline = start + 2 * length
    earliest = 0 if total is None else math.ceil(config.observe * total)
    return Stage(earliest, latest_start=max(latest, interval), steps=length, deadline=deadline)
