"""When things happen and how strong the penalty is: the run's length, Eq. 7, the automatic ramp.

All functions are pure but `find_scheduler`, which looks for the scheduler that drives an optimizer.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as sched

from ocsfast.config import Config


def paper_lambda(config: Config, elapsed: int) -> float:
    """Eq. 7: lambda `elapsed` = t - t_sl checks after sparsity learning began.

    growth="recursive": lambda_t = lambda_{t-1} + delta * floor((t - t_sl) / delta_every), as written.
    growth="linear": lambda_0 + delta * floor((t - t_sl) / delta_every), the paper's prose and code.
    """
    intervals, rest = divmod(max(0, elapsed), config.delta_every)
    if config.growth == "linear":
        return config.lambda0 + config.delta * intervals
    # sum of floor(k / d) for k = 1 .. elapsed: each value below `intervals` occurs d times
    total = config.delta_every * intervals * (intervals - 1) // 2 + intervals * (rest + 1)
    return config.lambda0 + config.delta * total


@dataclass(frozen=True)
class Ramp:
    """The automatic strength: lambda * lr, the relative shrinkage of one step, grows over `steps` steps.

    Its running sum is nats * p**2 ("linear") or nats * p**4 ("cubic") at the share p of the stage, so
    it is `nats` at the end whatever the learning rate does meanwhile. A stage that lasts longer than
    planned goes on at the last rate.
    """

    nats: float
    steps: float | Tensor
    shape: str

    def total(self, step: float | Tensor) -> float | Tensor:
        """Sum of lambda * lr over the first `step` steps; a tensor where one of these numbers is."""
        power = 2 if self.shape == "linear" else 4
        p = step / self.steps
        if isinstance(p, Tensor):
            return self.nats * torch.where(p <= 1, p**power, 1 + power * (p - 1))
        return self.nats * (p**power if p <= 1 else 1 + power * (p - 1))

    def at(self, step: float | Tensor) -> float | Tensor:
        """lambda * lr of step number `step`, 0-based."""
        return self.total(step + 1) - self.total(step)


@dataclass(frozen=True)
class Stage:
    """The planned sparsity-learning stage, in optimizer steps since attach."""

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

    With `total`: the stage takes `span` of it, less where the deadline is nearer, and begins at the
    latest `span` before the deadline, so that groups are never cut at full size because Eq. 5 took its
    time. Where checks begin too late for that, a deadline that is a share of the run waits for half of
    the stage, or of what is left of the run. Without `total`: the stage begins at the latest after four
    times the checks that Eq. 5 needs, takes as many steps as were observed before it, and the deadline
    follows after the same again.
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
    return Stage(latest_start=max(latest, interval), steps=length, deadline=deadline)


def find_scheduler(optimizer: Optimizer) -> sched.LRScheduler | None:
    """The scheduler that drives `optimizer`, or None; the outermost one if they are nested.

    A scheduler refers to its optimizer but not the other way round, so the garbage collector's list
    is searched; the wrapper that schedulers put around `optimizer.step` tells when that is worth it.
    """
    if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return None
    # type() and not isinstance(): lazy proxies answer isinstance() by importing what they stand for.
    found = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), sched.LRScheduler) and getattr(thing, "optimizer", None) is optimizer
    ]
    nested = {id(inner) for outer in found for inner in getattr(outer, "_schedulers", ())}
    outermost = [s for s in found if id(s) not in nested]
    known = [s for s in outermost if scheduler_length(s) is not None]
    best = known or outermost
    return best[-1] if best else None


def scheduler_length(scheduler: sched.LRScheduler) -> int | None:
    """Scheduler steps until the schedule ends, where its class tells; else None."""
    if isinstance(scheduler, sched.OneCycleLR):
        return int(scheduler.total_steps)
    if isinstance(scheduler, sched.CosineAnnealingLR):
        return int(scheduler.T_max)
    if isinstance(scheduler, sched.PolynomialLR):
        return int(scheduler.total_iters)
    if isinstance(scheduler, sched.LinearLR):  # a rise is a warm-up, which says nothing of the end
        return int(scheduler.total_iters) if scheduler.end_factor < scheduler.start_factor else None
    if isinstance(scheduler, sched.SequentialLR):
        last = scheduler_length(scheduler._schedulers[-1])
        return None if last is None else int(scheduler._milestones[-1]) + last
    if isinstance(scheduler, sched.ChainedScheduler):
        lengths = [scheduler_length(inner) for inner in scheduler._schedulers]
        return max((n for n in lengths if n is not None), default=None)
    if isinstance(scheduler, sched.LambdaLR):  # transformers' schedules are partials that know it
        for function in scheduler.lr_lambdas:
            steps = getattr(function, "keywords", {}).get("num_training_steps")
            if isinstance(function, functools.partial) and isinstance(steps, int):
                return steps
    return None


def scheduler_position(scheduler: sched.LRScheduler) -> int:
    """Scheduler steps taken so far."""
    inner = getattr(scheduler, "_schedulers", ())
    if not hasattr(scheduler, "last_epoch") and inner:  # ChainedScheduler keeps none of its own
        return scheduler_position(inner[0])
    return max(0, int(scheduler.last_epoch))


def run_length(length: int, first: tuple[int, int], now: tuple[int, int]) -> int | None:
    """Optimizer steps of the whole run, from a scheduler of `length` steps.

    Args:
        first, now: (optimizer steps, scheduler steps) at an earlier check and at this one. Their
            differences give the optimizer steps a scheduler step, whether it moves once a step or once
            an epoch, before or after the check.

    None until the scheduler has moved.
    """
    if now[1] > first[1]:
        per_step = (now[0] - first[0]) / (now[1] - first[1])
    elif now[1] > 0 and now[0] > 0:
        per_step = now[0] / now[1]
    else:
        return None
    return max(now[0], round(now[0] + (length - now[1]) * per_step))
