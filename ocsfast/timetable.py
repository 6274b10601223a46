"""When a run's checks are due, when its groups begin to shrink, and when the cut is late."""

from __future__ import annotations

import weakref

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ocsfast import schedule, stability
from ocsfast.config import Config
from ocsfast.errors import ConfigError
from ocsfast.history import Progress

# check_every="auto", called after every optimizer step: so many checks in a run, and never more steps
# between two of them than this.
INNER_LOOP_CHECKS, INNER_LOOP_STEPS = 50, 500


class Timetable:
    """Of one optimizer's run; how far that is comes with each question."""

    def __init__(self, config: Config, optimizer: Optimizer) -> None:
        self.config = config
        self.optimizer = optimizer
        self._scheduler: weakref.ref[LRScheduler] | None = None

    def forget(self) -> None:
        """Look for the scheduler again: `Progress` is of another run from now on."""
        self._scheduler = None

    def require_steps_left(self, now: Progress) -> None:
        """Refuse at the beginning a run that is over by what the user said of its length.

        Raises:
            ConfigError: `total_steps` is less than the steps that were taken before the first check.
        """
        total = self.config.total_steps
        if total is not None and now.check == 0 and now.steps > total:
            raise ConfigError(
                f"total_steps={total}, but the optimizer has taken {now.steps} already: the optimizer "
                "steps of the whole run are expected, not its epochs"
            )

    def is_due(self, now: Progress) -> bool:
        """Whether a call of `Pruner.step` makes a check; see there."""
        since_call, since_check = now.steps - now.at_call, now.steps - now.at_check
        if self.config.check_every == "auto":
            return since_call > 1 or since_check >= self._inner_loop_steps(now)
        return since_check >= int(self.config.check_every)

    def plan(self, now: Progress) -> schedule.Stage:
        """The sparsity-learning stage, from what is known now."""
        total = self._total_steps(now)
        return schedule.plan_stage(self.config, total, now.start, now.check, now.steps, now.begun)

    def should_start(self, now: Progress, stage: schedule.Stage) -> bool:
        """Eq. 5, or what stands for it."""
        if self.config.sparsify_from is not None:
            return now.check >= self.config.sparsify_from
        if stability.has_settled(now.indices, self.config.window, self.config.tau):
            return True
        return self.config.strength == "auto" and now.steps >= stage.latest_start

    def is_late(self, now: Progress, stage: schedule.Stage) -> bool:
        """Whether the deadline is over."""
        if isinstance(self.config.deadline, int):
            return now.check >= self.config.deadline
        return stage.deadline is not None and now.steps >= stage.deadline

    def _inner_loop_steps(self, now: Progress) -> int:
        """Optimizer steps between two checks where `step` is called after each of them."""
        if now.every == 0:  # kept until the next check: estimates of a run's length move
            total = self._total_steps(now)
            if total is None:
                return INNER_LOOP_STEPS
            now.every = min(INNER_LOOP_STEPS, max(1, total // INNER_LOOP_CHECKS))
        return now.every

    def _total_steps(self, now: Progress) -> int | None:
        """Optimizer steps of the whole run, or None if nothing tells."""
        if self.config.total_steps is not None:
            return self.config.total_steps
        scheduler = self._scheduler() if self._scheduler else None
        if scheduler is None:
            scheduler = schedule.find_scheduler(self.optimizer)
            if scheduler is None:
                return None
            self._scheduler = weakref.ref(scheduler)
            if now.position is None:
                now.position = (now.steps, schedule.scheduler_position(scheduler))
        length = schedule.scheduler_length(scheduler)
        if length is None:
            return None
        here = (now.steps, schedule.scheduler_position(scheduler))
        return schedule.run_length(length, now.position or here, here)
