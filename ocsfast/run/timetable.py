"""When a run's checks are due, when its groups begin to shrink, and when the cut is late."""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch.optim import Optimizer

from ocsfast.choice import stability
from ocsfast.core.config import Config
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.run import messages, schedulers
from ocsfast.run.stage import Stage, plan_stage
from ocsfast.run.state import Progress

# check_every="auto": so many checks in a run. `lag` and `window` are then 1 and 1.5 % of it, as in the
# paper's own runs, which have 130 and 300.
CHECKS = 200
# Where nothing tells the run's length, and step is called after every optimizer step: steps to a check.
STEPS = 500


class Timetable:
    """Says when a run's checks, sparsity learning and deadline fall.

    Pass the run's `Progress` with each question. Questions change nothing in it; `note` and
    `note_position` write into it what later estimates of the run's length go by.

    Args:
        config: of the run.
        optimizer: whose learning-rate scheduler may tell how long the run is.
    """

    def __init__(self, config: Config, optimizer: Optimizer) -> None:
        self.config = config
        self.optimizer = optimizer
        self._scheduler: weakref.ref[Any] | None = None
        self._looked = -1  # the number of checks at the last search for a scheduler

    def forget(self) -> None:
        """Look for the scheduler again: `Progress` is of another run from now on."""
        self._scheduler, self._looked = None, -1

    def take_over(self, now: Progress) -> None:
        """Plan anew what a state holds of a run that had another plan.

        Raises:
            StateError: `epochs` is to be counted where calls came after every optimizer step.
        """
        now.every = 0
        if self.config.epochs is not None and now.calls and now.at_call - now.begun <= now.calls:
            raise StateError(
                f"epochs={self.config.epochs} counts calls of step, one an epoch, but the state is of a "
                "run that made one after every optimizer step: pass total_steps= instead"
            )
        given = self.config.total_steps is not None or self.config.epochs is not None
        if now.stage == "sparsify" and given:
            now.planned = self.plan(now).steps

    def require_steps_left(self, now: Progress) -> None:
        """Refuse at the beginning a run that is over by what the user said of its length.

        Raises:
            ConfigError: `total_steps` is less than the steps that were taken before the first check, or
                `epochs` than the calls of `step`.
        """
        epochs, calls = self.config.epochs, now.listened + now.all_calls()
        if epochs is not None and now.check == 0 and calls > epochs:
            raise ConfigError(
                f"epochs={epochs}, but this is call {calls} of step: the epochs of the whole run are "
                "expected, and one call in each"
            )
        total = self.config.total_steps
        if total is not None and now.check == 0 and now.steps > total:
            raise ConfigError(
                f"total_steps={total}, but the optimizer has taken {now.steps} already: the optimizer "
                "steps of the whole run are expected, not its epochs"
            )

    def is_due(self, now: Progress) -> bool:
        """Whether a call of `Pruner.step` makes a check, or an optimizer step between two; see there."""
        since_call, since_check = now.steps - now.at_call, now.steps - now.at_check
        if now.between:
            follows = now.apart == since_call == 1  # a call, as it did upon the last step
            return 0 < now.every <= since_check and not follows
        if now.waits:
            return True
        if self.config.check_every == "auto":
            return since_check >= now.every if now.every else since_call > 1 or since_check >= STEPS
        return since_check >= (1 if self.config.check_every == "call" else int(self.config.check_every))

    def note(self, now: Progress) -> None:
        """Write down how many steps there are to the next check, where that is known.

        `is_due` goes by it. Estimates of a run's length move; a check that moved with them might never
        come.
        """
        if self.config.check_every == "auto" and now.every == 0:
            self.note_position(now)
            total = self.total_steps(now)
            if total is not None:
                now.every = max(1, total // CHECKS)

    def note_position(self, now: Progress) -> None:
        """Write down where optimizer and scheduler stood when both were first seen."""
        told = self.config.total_steps is not None or self.config.epochs is not None
        if not told and not now.between and now.position is None:
            scheduled = self._scheduled(now)
            now.position = None if scheduled is None else scheduled[1]

    def plan(self, now: Progress) -> Stage:
        """The sparsity-learning stage, from what is known now."""
        total = self.total_steps(now)
        return plan_stage(self.config, total, now.start, now.check, now.steps, now.begun)

    def should_start(self, now: Progress, stage: Stage) -> bool:
        """Eq. 5; or `sparsify_from` in its place, or the latest start that the plan allows."""
        if self.config.sparsify_from is not None:
            return now.check >= self.config.sparsify_from
        if now.steps >= stage.earliest_start and stability.has_settled(
            now.indices, self.config.window, self.config.tau
        ):
            return True
        return self.config.strength == "auto" and now.steps >= stage.latest_start

    def is_late(self, now: Progress, stage: Stage) -> bool:
        """Whether the deadline is over."""
        if isinstance(self.config.deadline, int):
            return now.check >= self.config.deadline
        return stage.deadline is not None and now.steps >= stage.deadline

    def total_steps(self, now: Progress) -> int | None:
        """Optimizer steps of the whole run, or None if nothing tells."""
        if self.config.total_steps is not None:
            return self.config.total_steps
        if now.between:  # an epoch is half over, and a scheduler may have yet to move
            return now.length if now.length is not None and now.told == self._told(now) else None
        if self.config.epochs is not None:
            return _steps_of(self.config.epochs, now)
        scheduler = self._find_scheduler(now)
        if scheduler is not None and schedulers.is_timms(scheduler):
            position = now.listened + now.all_calls() if scheduler.t_in_epochs else now.steps
            length = schedulers.timm_length(scheduler, position)
            if length is None:
                return None
            return _steps_of(length, now) if scheduler.t_in_epochs else max(now.steps, length)
        scheduled = self._scheduled(now)
        if scheduled is None:
            return None
        length, here = scheduled
        return schedulers.run_length(length, now.position or here, here)

    def note_length(self, now: Progress) -> None:
        """At a call: write down how long the run is, for the checks until the next one."""
        now.length, now.told = self.total_steps(now), self._told(now)

    def _told(self, now: Progress) -> int | None:
        """What the length of the run goes by, which may be another one where the run is resumed."""
        if self.config.epochs is not None:
            return self.config.epochs
        scheduler = self._find_scheduler(now)
        if scheduler is None:
            return None
        if schedulers.is_timms(scheduler):
            return schedulers.timm_length(scheduler, 0)
        return schedulers.scheduler_length(scheduler)

    def _scheduled(self, now: Progress) -> tuple[int, tuple[int, int]] | None:
        """The length that a scheduler of torch's tells, and where optimizer and scheduler stand."""
        scheduler = self._find_scheduler(now)
        if scheduler is None or schedulers.is_timms(scheduler):
            return None
        length = schedulers.scheduler_length(scheduler)
        if length is None:
            return None
        return length, (now.steps, schedulers.scheduler_position(scheduler))

    def source(self) -> str:
        """The class of the scheduler that tells the length, or will once it has moved; else ""."""
        found = self._scheduler() if self._scheduler else schedulers.find_scheduler(self.optimizer)
        known = found is not None and schedulers.scheduler_length(found) is not None
        return type(found).__name__ if known else ""

    def spoken(self, now: Progress) -> str:
        """When groups shrink and the cut comes, as far as that is known, for the log."""
        config = self.config
        if config.epochs is not None:
            total = self.total_steps(now)
            if total is not None:
                return messages.planned(
                    config, self.plan(now), total / config.epochs, "epoch", config.epochs
                )
            if now.steps:
                return "The stages are planned once an epoch has been seen"
            fine = 1000  # as many steps as make rounding small
            stage = plan_stage(config, fine * config.epochs, None, 0, 0)
            return messages.planned(config, stage, fine, "epoch", config.epochs)
        if config.total_steps is not None:
            return messages.planned(config, self.plan(now), 1, "optimizer step", config.total_steps)
        if isinstance(config.deadline, int):
            return f"The cut comes at check {config.deadline} at the latest"
        source = self.source()
        if source == "MultiStepLR":
            source += ", until its last milestone (pass epochs= if the run is longer)"
        return (
            f"The stages will be planned by {source}"
            if source
            else ("Nothing tells yet how long the run is")
        )

    def lacks_length(self, now: Progress, stage: Stage) -> bool:
        """Whether this is the check to say that nothing tells the length: the first one.

        A scheduler that has not moved by then tells at the next check, if it ever does.
        """
        if stage.deadline is not None or self.config.deadline is None or now.check > 2:
            return False
        return now.check == (2 if self.config.epochs is None and self.source() else 1)

    def latest_checks(self, now: Progress) -> tuple[int, int] | None:
        """The checks at which groups begin to shrink and the cut comes, at the latest.

        For a run of unknown length, as `plan_stage` plans it, with checks as far apart as they
        have been. None where the stage begins by Eq. 5 alone.
        """
        every = max(1, (now.steps - now.begun) // max(1, now.check))
        if self.config.sparsify_from is not None:
            first = max(now.check, self.config.sparsify_from)
        elif self.config.strength == "auto":
            latest = plan_stage(self.config, None, None, now.check, now.steps, now.begun).latest_start
            first = max(now.check, math.ceil((latest - now.begun) / every))
        else:
            return None
        start = now.begun + first * every
        deadline = plan_stage(self.config, None, start, first, start, now.begun).deadline
        assert deadline is not None  # asked for only where there is one
        return first, math.ceil((deadline - now.begun) / every)

    def _find_scheduler(self, now: Progress) -> Any | None:
        scheduler = self._scheduler() if self._scheduler else None
        if scheduler is not None or not schedulers.is_scheduled(self.optimizer):
            return scheduler
        if self._looked != now.check:  # a search takes too long to be made at every optimizer step
            self._looked = now.check
            scheduler = schedulers.find_scheduler(self.optimizer)
            self._scheduler = None if scheduler is None else weakref.ref(scheduler)
        return scheduler


def require_apart(config: Config, apart: int) -> None:
    """Refuse `epochs` where `step` is called after every optimizer step.

    Args:
        apart: optimizer steps since the last call, or the first ones.

    Raises:
        ConfigError: it is one.
    """
    if config.epochs is not None and apart == 1:
        raise ConfigError(
            f"epochs={config.epochs}, but step is called after every optimizer step: epochs= counts "
            "calls, one an epoch. Pass total_steps= instead, the optimizer steps of the whole run"
        )


def _steps_of(epochs: int, now: Progress) -> int | None:
    """Optimizer steps of a run of so many epochs, with one call of `step` in each.

    The steps an epoch are those seen so far. None where nothing is seen yet, and where the calls are one
    step apart, which is no epoch.
    """
    calls = now.all_calls()
    each = (now.steps - now.begun) / max(1, calls)
    if calls == 0 or each <= 1:
        return None
    return max(now.steps, round(now.steps + (epochs - now.listened - calls) * each))
