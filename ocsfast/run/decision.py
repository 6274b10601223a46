"""What a check leads to: nothing yet, sparsity learning, or the cut."""

from __future__ import annotations

from dataclasses import dataclass

from ocsfast.choice import stability
from ocsfast.choice.budget import Aim
from ocsfast.choice.selection import Choice
from ocsfast.core.config import Config
from ocsfast.run.stage import Stage
from ocsfast.run.state import Progress
from ocsfast.run.timetable import Timetable


@dataclass(frozen=True)
class Decision:
    """What a check leads to, and why."""

    ready: bool  # stable, and small enough to be cut without harm
    late: bool  # the deadline has come
    forced: bool  # asked for by `Pruner.cut`
    begins: bool  # sparsity learning begins

    @property
    def cut(self) -> bool:
        return self.ready or self.late or self.forced


def decide(
    config: Config,
    timetable: Timetable,
    now: Progress,
    stage: Stage,
    choice: Choice,
    aim: Aim,
    forced: bool,
) -> Decision:
    """Read Eq. 5, Eq. 6 and the deadline off a choice.

    Args:
        now: with this check counted.
        stage: as planned now.
        aim: what the choice was made for.
        forced: whether to cut in any case.
    """
    shrinks = choice.cost < aim.now
    ready = _is_ready(config, now, choice) and choice.cost <= aim.budget
    late = timetable.is_late(now, stage) and shrinks
    begins = now.stage == "observe" and shrinks and timetable.should_start(now, stage)
    return Decision(ready, late, forced, begins and not (ready or late or forced))


def _is_ready(config: Config, now: Progress, choice: Choice) -> bool:
    """Eq. 6, and little enough left in what goes."""
    if now.t_sl is None or now.check <= now.t_sl:
        return False
    small = config.max_residual is None or choice.residual < config.max_residual
    return small and stability.is_stable(now.indices, config.window, config.epsilon)
