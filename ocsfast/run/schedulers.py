"""Learning-rate schedulers, which tell how long a run is: finding an optimizer's, reading its length."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as sched

# What the functions of a LambdaLR call the length of the schedule: those of transformers and diffusers
# the first, hand-written ones one of the others.
LENGTH_NAMES = ("num_training_steps", "total_steps", "max_steps", "total_iters", "max_iters")


def find_scheduler(optimizer: Optimizer) -> Any | None:
    """The scheduler of torch or timm that drives `optimizer`, or None; the outermost one of nested ones.

    A scheduler refers to its optimizer but not the other way round, so the garbage collector's list
    is searched. That takes tens of milliseconds; what schedulers leave behind tells when it is worth it.
    """
    if not is_scheduled(optimizer):
        return None
    timm = _timms()
    kinds = (sched.LRScheduler,) if timm is None else (sched.LRScheduler, timm)
    # type() and not isinstance(): lazy proxies answer isinstance() by importing what they stand for.
    found = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), kinds) and getattr(thing, "optimizer", None) is optimizer
    ]
    nested = {id(inner) for outer in found for inner in getattr(outer, "_schedulers", ())}
    outermost = [s for s in found if id(s) not in nested]
    known = [s for s in outermost if scheduler_length(s) is not None]
    best = known or outermost
    return best[-1] if best else None


def is_scheduled(optimizer: Optimizer) -> bool:
    """Whether a scheduler has left its traces: torch's wrap `step`, and all keep the first rate."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return True
    return any("initial_lr" in group for group in optimizer.param_groups)


def scheduler_length(scheduler: Any) -> int | None:
    """Scheduler steps until the schedule ends, where its class tells; else None.

    Milestones say that the run does not end before the last of them, which is the best there is to plan
    with. Once it has passed, they say nothing any more.
    """
    if isinstance(scheduler, sched.OneCycleLR):
        return int(scheduler.total_steps)
    if isinstance(scheduler, sched.CosineAnnealingLR):
        return int(scheduler.T_max)
    if isinstance(scheduler, sched.PolynomialLR):
        return int(scheduler.total_iters)
    if isinstance(scheduler, sched.LinearLR):  # a rise is a warm-up, which says nothing of the end
        return int(scheduler.total_iters) if scheduler.end_factor < scheduler.start_factor else None
    if isinstance(scheduler, sched.MultiStepLR):
        last = max(scheduler.milestones, default=0)
        return int(last) if scheduler.last_epoch < last else None
    if isinstance(scheduler, sched.SequentialLR):
        end = scheduler_length(scheduler._schedulers[-1])
        return None if end is None else int(scheduler._milestones[-1]) + end
    if isinstance(scheduler, sched.ChainedScheduler):
        lengths = [scheduler_length(inner) for inner in scheduler._schedulers]
        return max((n for n in lengths if n is not None), default=None)
    if isinstance(scheduler, sched.LambdaLR):
        return next((n for n in map(_lambda_length, scheduler.lr_lambdas) if n is not None), None)
    return timm_length(scheduler, 0) if is_timms(scheduler) else None


def scheduler_position(scheduler: sched.LRScheduler) -> int:
    """Scheduler steps taken so far."""
    inner = getattr(scheduler, "_schedulers", ())
    if not hasattr(scheduler, "last_epoch") and inner:  # ChainedScheduler keeps none of its own
        return scheduler_position(inner[0])
    return max(0, int(scheduler.last_epoch))


def is_timms(scheduler: Any) -> bool:
    """Whether it is timm's. Those keep no count: each step tells them the epoch, or the update."""
    timm = _timms()
    return timm is not None and issubclass(type(scheduler), timm)


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


def timm_length(scheduler: Any, position: int) -> int | None:
    """As `scheduler_length`, in epochs or updates, whichever `position` and the scheduler count."""
    if hasattr(scheduler, "get_cycle_length"):  # counts the warm-up, where that comes on top
        return int(scheduler.get_cycle_length())
    milestones = getattr(scheduler, "decay_t", None)
    if not isinstance(milestones, (list, tuple)) or not milestones:
        return None
    last = int(max(milestones)) + (int(scheduler.warmup_t) if scheduler.warmup_prefix else 0)
    return last if position < last else None


def _timms() -> type | None:
    """timm's base class, if anything has imported it."""
    return getattr(sys.modules.get("timm.scheduler.scheduler"), "Scheduler", None)


def _lambda_length(function: Any) -> int | None:
    """The length that a LambdaLR's function computes with, by the name of the variable."""
    names = _names_seen(function)
    for name in LENGTH_NAMES:
        length = names.get(name)
        if isinstance(length, float) and length.is_integer():  # 1e5
            length = int(length)
        if isinstance(length, int) and not isinstance(length, bool) and length > 0:
            return length
    parts = [names.get(f"num_{part}_steps") for part in ("warmup", "stable", "decay")]
    counts = [part for part in parts if isinstance(part, int)]
    return sum(counts) if len(counts) == 3 else None  # transformers' get_wsd_schedule has all three


def _names_seen(function: Any) -> Mapping[str, Any]:
    """Variables that a function reads and that are not its own: they were there when it was made."""
    if isinstance(function, functools.partial):
        return {**_names_seen(function.func), **function.keywords}
    if inspect.ismethod(function):
        return {**getattr(function.__self__, "__dict__", {}), **_names_seen(function.__func__)}
    if not inspect.isfunction(function):
        return getattr(function, "__dict__", {})
    try:
        seen = inspect.getclosurevars(function)
    except ValueError:  # a variable that is not set yet
        return {}
    return {**seen.globals, **seen.nonlocals}
