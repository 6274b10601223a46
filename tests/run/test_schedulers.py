"""Schedulers of torch, timm, transformers and one's own: which one it is, and the length it tells."""

import functools
import gc
import math

import pytest
from helpers.networks import EPOCH, net, sgd, train
from helpers.runs import attach
from torch.optim import lr_scheduler as sched

from ocsfast import Config
from ocsfast.run.schedulers import (
    _lambda_length,
    find_scheduler,
    run_length,
    scheduler_length,
    scheduler_position,
    timm_length,
)
from ocsfast.run.state import Progress
from ocsfast.run.timetable import Timetable


def test_finds_the_outermost_scheduler():
    optimizer = sgd(net())
    assert find_scheduler(optimizer) is None
    warm = sched.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = sched.CosineAnnealingLR(optimizer, 95)
    both = sched.SequentialLR(optimizer, [warm, cosine], [5])
    assert find_scheduler(optimizer) is both
    assert scheduler_length(both) == 100
    assert find_scheduler(sgd(net())) is None


def test_lengths_that_schedulers_tell():
    optimizer = sgd(net())
    assert scheduler_length(sched.OneCycleLR(optimizer, 0.1, total_steps=70)) == 70
    assert scheduler_length(sched.PolynomialLR(optimizer, 30)) == 30
    assert scheduler_length(sched.LinearLR(optimizer, 1.0, 0.01, total_iters=20)) == 20
    assert scheduler_length(sched.LinearLR(optimizer, 0.1, 1.0, total_iters=20)) is None
    chained = sched.ChainedScheduler([sched.CosineAnnealingLR(optimizer, 40)])
    assert (scheduler_length(chained), scheduler_position(chained)) == (40, 0)


@pytest.mark.parametrize("after", [True, False])
def test_run_length_by_counting(after):
    # a scheduler that moves once an epoch of 7 steps, before or after the check
    at = [(7 * e, e if after else e - 1) for e in range(1, 6)]
    assert run_length(20, at[0], at[0]) == (140 if after else None)
    totals = {run_length(20, at[0], now) for now in at[1:]}
    assert totals == ({140} if after else {147})


@pytest.mark.parametrize(
    "make",
    [
        lambda o: sched.StepLR(o, 30),
        lambda o: sched.ExponentialLR(o, 0.9),
        lambda o: sched.ConstantLR(o, total_iters=5),
        lambda o: sched.ReduceLROnPlateau(o),
        lambda o: sched.CosineAnnealingWarmRestarts(o, 10),
        lambda o: sched.LambdaLR(o, lambda step: 0.9**step),
        lambda o: sched.MultiStepLR(o, []),
    ],
)
def test_lengths_that_schedulers_do_not_tell(make):
    assert scheduler_length(make(sgd(net()))) is None


def test_the_last_milestone_counts_until_it_has_passed():
    optimizer = sgd(net())
    scheduler = sched.MultiStepLR(optimizer, [4, 2])
    assert find_scheduler(optimizer) is scheduler
    lengths = []
    for _ in range(5):
        lengths.append(scheduler_length(scheduler))
        optimizer.step()
        scheduler.step()
    assert lengths == [4, 4, 4, 4, None]
    warm = sched.LinearLR(optimizer, 0.1, total_iters=5)
    drops = sched.MultiStepLR(optimizer, [30, 60])
    assert scheduler_length(sched.SequentialLR(optimizer, [warm, drops], [5])) == 65


def test_functions_of_transformers():
    transformers = pytest.importorskip("transformers")
    optimizer = sgd(net())

    def length(name, **more):
        return scheduler_length(transformers.get_scheduler(name, optimizer, 5, 90, more or None))

    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial"):
        assert length(name) == 90
    assert length("cosine_with_min_lr", min_lr_rate=0.1) == 90
    assert length("cosine_warmup_with_min_lr", min_lr_rate=0.1) == 90
    assert length("warmup_stable_decay", num_decay_steps=20) == 90
    stable = transformers.get_wsd_schedule(optimizer, 5, 20, num_stable_steps=55)
    assert scheduler_length(stable) == 80
    for name in ("constant", "constant_with_warmup", "inverse_sqrt"):
        assert length(name) is None


def as_diffusers_does(optimizer, num_warmup_steps, num_training_steps):
    """Its get_linear_schedule_with_warmup, word for word the same way: a closure, where others bind."""

    def lr_lambda(current_step: int):
        if current_step < num_warmup_steps:
            return float(current_step) / float(max(1, num_warmup_steps))
        return max(0.0, float(num_training_steps - current_step) / float(num_training_steps))

    return sched.LambdaLR(optimizer, lr_lambda)


max_iters = 1e2


class Bell:
    def __init__(self, total_steps):
        self.total_steps = total_steps

    def __call__(self, step):
        return 1 - abs(step / self.total_steps - 0.5)

    def at(self, step):
        return self(step)


def test_functions_of_ones_own():
    optimizer = sgd(net())
    assert scheduler_length(as_diffusers_does(optimizer, 5, 70)) == 70

    def length(function):
        return scheduler_length(sched.LambdaLR(optimizer, function))

    def line(max_steps):
        return lambda step: 1 - step / float(max_steps)

    assert length(line(40)) == length(line(40.0)) == 40
    for nothing in (True, 0, -3, 2.5, "20", None):
        assert _lambda_length(line(nothing)) is None
    assert length(lambda step: math.cos(step / max_iters)) == 100  # a global variable
    assert length(functools.partial(lambda step, total_iters: step / total_iters, total_iters=30)) == 30
    assert length(Bell(20)) == length(Bell(20).at) == 20
    n = 50
    assert length(lambda step: 1 - step / n) is None  # nothing says what n is


def test_a_variable_that_is_not_set_yet():
    optimizer = sgd(net())
    scheduler = sched.LambdaLR(optimizer, lambda step: 1 - step / total_steps if step else 1.0)
    assert scheduler_length(scheduler) is None
    total_steps = 25
    assert scheduler_length(scheduler) == 25


def test_timms_tell_epochs_or_updates():
    timm = pytest.importorskip("timm.scheduler")
    optimizer = sgd(net())
    assert find_scheduler(optimizer) is None
    made = timm.CosineLRScheduler(optimizer, t_initial=30, warmup_t=3, warmup_prefix=True)
    assert find_scheduler(optimizer) is made

    def length(sched, position=0, **more):
        more = {"num_epochs": 30, "warmup_epochs": 3, **more}
        return timm_length(timm.create_scheduler_v2(optimizer, sched, **more)[0], position)

    assert length("cosine") == length("tanh") == length("poly") == length("cosine", 99) == 30
    assert length("cosine", warmup_prefix=True) == 33
    assert length("cosine", cycle_limit=3) == 90
    assert length("cosine", cycle_mul=2.0, cycle_limit=2) == 30 + 60
    assert length("cosine", step_on_epochs=False, updates_per_epoch=7) == 210
    assert length("wsd") == 30
    assert length("multistep", decay_milestones=[10, 20], warmup_prefix=False) == 20
    assert length("multistep", decay_milestones=[10, 20], warmup_prefix=True) == 23
    assert length("multistep", 20, decay_milestones=[10, 20], warmup_prefix=False) is None
    assert length("step") is None


@pytest.mark.parametrize("per_epoch", [True, False])
def test_a_run_that_timm_plans(per_epoch):
    """By calls of `step` where timm counts epochs, by optimizer steps where it counts updates."""
    timm = pytest.importorskip("timm.scheduler")
    model = net()
    optimizer = sgd(model)
    scheduler, _ = timm.create_scheduler_v2(
        optimizer, num_epochs=20, step_on_epochs=per_epoch, updates_per_epoch=EPOCH
    )
    pruner = attach(model, optimizer, lag=9, epsilon=0.0, max_residual=1e-9)
    for epoch in range(12):
        for k in range(EPOCH):
            train(model, optimizer, 1, first=epoch * EPOCH + k)
            scheduler.step_update(epoch * EPOCH + k + 1)
        scheduler.step(epoch + 1)
        pruner.step()
    assert (pruner.t_sl, pruner.t_cut) == (8, 12)


def test_epochs_of_timm_cannot_be_told_from_calls_after_every_step():
    timm = pytest.importorskip("timm.scheduler")
    optimizer = sgd(net())
    scheduler = timm.CosineLRScheduler(optimizer, t_initial=30)
    now = Progress(steps=6, at_call=5, calls=5)
    assert scheduler.t_in_epochs
    assert Timetable(Config(), optimizer).total_steps(now) is None


def test_a_search_is_made_once_a_check_and_only_where_there_are_traces(monkeypatch):
    searches = []
    collected = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: searches.append(1) or collected())
    optimizer = sgd(net())
    table, now = Timetable(Config(), optimizer), Progress(steps=5)
    for _ in range(3):
        assert table.total_steps(now) is None
    assert len(searches) == 0
    optimizer.param_groups[0]["initial_lr"] = 0.1  # the scheduler that left it is gone
    for _ in range(3):
        assert table.total_steps(now) is None
    assert len(searches) == 1
    now.check += 1
    scheduler = sched.CosineAnnealingLR(optimizer, 9)
    for _ in range(3):
        table.total_steps(now)
    assert len(searches) == 2
    assert table._scheduler() is scheduler
