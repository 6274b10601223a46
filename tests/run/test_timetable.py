"""`epochs=`: how long a run is, counted in calls of `step`; and plans that change when a run resumes."""

import pytest
import torch
from helpers.networks import EPOCH, batch, epochs, net, sgd, train
from helpers.runs import attach, run
from torch import nn

import ocsfast
from ocsfast import Config, ConfigError, StateError
from ocsfast.api.calls import options_of
from ocsfast.run.state import Progress
from ocsfast.run.timetable import Timetable


def uneven(drive, count, model, optimizer, sizes=(EPOCH,)):
    """Train for `count` epochs of so many steps, in turn, and call `drive` after each: its reports."""
    done, reports = 0, []
    for epoch in range(count):
        steps = sizes[epoch % len(sizes)]
        train(model, optimizer, steps, first=done)
        done += steps
        reports.append(drive())
    return reports


# Neither Eq. 5 nor Eq. 6 comes before the plan's own limits.
LATE = {"lag": 9, "epsilon": 0.0, "max_residual": 1e-9, "check_every": "call"}


def test_by_step():
    model = net()
    optimizer = sgd(model)
    reports = uneven(lambda: ocsfast.step(model, 0.5, epochs=20, **LATE), 14, model, optimizer)
    assert [r.stage for r in reports] == ["observe"] * 7 + ["sparsify"] * 4 + ["pruned"] * 3
    assert [r.check for r in reports] == [0, *range(1, 12), 11, 11]  # the first call only listens
    assert reports[11].cut
    assert reports[11].nats == pytest.approx(3.0)


def test_by_step_with_the_inputs_at_hand():
    model = net()
    optimizer = sgd(model)
    inputs = batch(0)[0]
    reports = uneven(
        lambda: ocsfast.step(model, 0.5, epochs=20, example_inputs=inputs, **LATE), 12, model, optimizer
    )
    assert [r.stage for r in reports] == ["observe"] * 7 + ["sparsify"] * 4 + ["pruned"]


@pytest.mark.parametrize("before", [0, 7])
def test_by_attach(before):
    """Steps of before the attach are of no epoch of this run."""
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, before)
    pruner = attach(model, optimizer, epochs=20, **LATE)
    uneven(pruner.step, 12, model, optimizer)
    assert (pruner.t_sl, pruner.t_cut) == (8, 12)


def test_a_config_says_it_too():
    model = net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer, config=Config(epochs=20, **LATE))
    uneven(pruner.step, 12, model, optimizer)
    assert (pruner.t_sl, pruner.t_cut) == (8, 12)


def total(sizes, calls, epochs=20, begun=0, listened=0):
    """What is known of the run's length during call number `calls`."""
    steps = begun + sum(sizes[k % len(sizes)] for k in range(calls))
    last = steps - sizes[(calls - 1) % len(sizes)]
    now = Progress(steps=steps, at_call=last, begun=begun, calls=calls - 1, listened=listened)
    return Timetable(Config(epochs=epochs), sgd(net())).total_steps(now)


def test_steps_an_epoch_are_those_seen():
    assert [total([5], calls) for calls in (1, 2, 19, 20)] == [100] * 4
    assert [total([5], calls, begun=5, listened=1) for calls in (1, 10, 19)] == [100] * 3
    # 13 batches, gathered by four into a step: every fourth epoch has one more
    assert [total([3, 3, 3, 4], calls) for calls in (1, 2, 3, 4, 8, 9)] == [60, 60, 60, 65, 65, 64]
    assert total([5], 23) == 115  # it goes on for longer than was said


def test_nothing_is_known_ahead_of_the_first_call():
    assert Timetable(Config(epochs=20), sgd(net())).total_steps(Progress(steps=7, at_call=7)) is None


def test_two_calls_after_the_same_steps_are_one_epoch():
    model, optimizer, pruner = run(total_steps=None, epochs=20, **LATE)

    def twice():
        report = pruner.step()
        assert pruner.step() == ocsfast.step(model, 0.5)
        return report

    uneven(twice, 12, model, optimizer)
    assert pruner.t_cut == 12


def test_the_order_of_what_tells():
    optimizer = sgd(net())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=70)
    optimizer.step()
    scheduler.step()
    now = Progress(steps=5)
    lengths = [
        Timetable(config, optimizer).total_steps(now)
        for config in (Config(total_steps=40), Config(epochs=12), Config())
    ]
    assert lengths == [40, 60, 350]


def test_both_are_too_many():
    with pytest.raises(ConfigError, match=r"total_steps=100 and epochs=20 both .*: give one"):
        Config(total_steps=100, epochs=20)
    for config, field in ((Config(epochs=9), "total_steps"), (Config(total_steps=9), "epochs")):
        options = options_of(config, {field: 7})
        assert {"total_steps": options.total_steps, "epochs": options.epochs} == {
            "total_steps": None,
            "epochs": None,
            field: 7,
        }
    assert options_of(Config(epochs=9), {"total_steps": None, "tau": 0.1}).epochs == 9


def test_calls_after_every_optimizer_step_are_no_epochs():
    model = net()
    optimizer = sgd(model)
    said = r"epochs=20, but step is called after every optimizer step: .* Pass total_steps= instead"
    train(model, optimizer, 1)
    with pytest.raises(ConfigError, match=said):
        ocsfast.step(model, 0.5, epochs=20)
    assert not model._forward_pre_hooks
    train(model, optimizer, 1)
    ocsfast.step(model, 0.5, epochs=20)  # no call after the first step was heard
    train(model, optimizer, 1)
    with pytest.raises(ConfigError, match=said):
        ocsfast.step(model, 0.5, epochs=20)
    assert not optimizer._optimizer_step_post_hooks
    model, optimizer, pruner = run(total_steps=None, epochs=20, check_every=1)
    train(model, optimizer, EPOCH)
    pruner.step()
    train(model, optimizer, 1)
    before = pruner.state_dict()["progress"]
    with pytest.raises(ConfigError, match=said):
        pruner.step()
    assert pruner.state_dict()["progress"] == before
    assert len(pruner.history) == 1


def test_more_calls_than_epochs():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, EPOCH)
    ocsfast.step(model, 0.5, epochs=1)
    train(model, optimizer, EPOCH)
    with pytest.raises(ConfigError, match="epochs=1, but this is call 2 of step"):
        ocsfast.step(model, 0.5, epochs=1)


@pytest.mark.parametrize("stop", [3, 9])
def test_resumed_from_a_state(stop):
    model, optimizer, pruner = run(total_steps=None, epochs=20, **LATE)
    epochs(model, optimizer, pruner, stop)
    state = pruner.state_dict()
    other, others, resumed = run(total_steps=None, epochs=20, **LATE)
    resumed.load_state_dict(state)
    epochs(other, others, resumed, 12 - stop, first=stop)
    assert (resumed.t_sl, resumed.t_cut) == (8, 12)
    assert resumed.history[-1].nats == pytest.approx(3.0)


PLANS = [
    ({"epochs": 40}, (16, 24)),
    ({"total_steps": 40 * EPOCH}, (16, 24)),
    ({"epochs": 15}, (6, 9)),
    ({"epochs": 20, "check_every": EPOCH}, (8, 12)),
]


@pytest.mark.parametrize(("plan", "expected"), PLANS)
def test_the_plan_of_now_counts(plan, expected):
    model, optimizer, pruner = run(**LATE)  # total_steps of 20 epochs
    epochs(model, optimizer, pruner, 3)
    state = pruner.state_dict()
    other, others, resumed = run(**{"total_steps": None, **LATE, **plan})
    resumed.load_state_dict(state)
    epochs(other, others, resumed, expected[1] - 3, first=3)
    assert (resumed.t_sl, resumed.t_cut) == expected


def test_a_plan_that_changes_while_groups_shrink():
    """The ramp goes on to the new deadline, and reaches it with groups as small as planned, about."""
    model, optimizer, pruner = run(**LATE)
    epochs(model, optimizer, pruner, 9)
    state = pruner.state_dict()
    assert (state["progress"]["start"], state["progress"]["planned"]) == (8 * EPOCH, 4 * EPOCH)
    other, others, resumed = run(total_steps=None, epochs=30, **LATE)
    resumed.load_state_dict(state)
    planned = resumed.state_dict()["progress"]["planned"]
    assert planned == 6 * EPOCH  # 0.2 of 30, which ends before the deadline at 18
    epochs(other, others, resumed, 9, first=9)
    assert (resumed.t_sl, resumed.t_cut) == (8, 18)


def test_an_interval_of_another_plan_is_measured_anew():
    model, optimizer, pruner = run(total_steps=600, check_every="auto")  # a check in 3 steps
    for k in range(2):
        train(model, optimizer, 1, first=k)
        pruner.step()
    state = pruner.state_dict()
    assert state["progress"]["every"] == 3
    other, others, resumed = run(total_steps=1200, check_every="auto")
    resumed.load_state_dict(state)
    checks = []
    for k in range(2, 7):
        train(other, others, 1, first=k)
        checks.append(resumed.step().check)
    assert checks == [0, 0, 0, 1, 1]


def test_epochs_cannot_be_counted_in_a_state_of_calls_after_every_step():
    model, optimizer, pruner = run(total_steps=150)
    for k in range(4):
        train(model, optimizer, 1, first=k)
        pruner.step()
    state = pruner.state_dict()
    _, _, other = run(total_steps=None, epochs=20)
    before = other.state_dict()["progress"]
    with pytest.raises(StateError, match=r"epochs=20 counts calls of step, .* pass total_steps="):
        other.load_state_dict(state)
    assert other.state_dict()["progress"] == before


def test_after_the_cut_the_length_is_moot():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 14)
    assert pruner.stage == "pruned"
    state, cut = pruner.state_dict(), ocsfast.step(model, 0.5)
    for length in ({"epochs": 3}, {"total_steps": 9}, {"config": Config(check_every=7)}):
        assert ocsfast.step(model, 0.5, **length) == cut
    with pytest.raises(ConfigError, match=r"^tau: not as in the first call"):
        ocsfast.step(model, 0.5, epochs=3, tau=0.5)
    with pytest.raises(ConfigError, match=r"ratio=0\.4 differs"):
        ocsfast.step(model, 0.4, epochs=3)
    for length in ({"total_steps": 9}, {"total_steps": None, "epochs": 1}):
        other, others, resumed = run(**length)
        resumed.load_state_dict(state)
        assert other.conv1.out_channels == model.conv1.out_channels
        train(other, others, EPOCH)
        assert resumed.step() == cut


def test_before_the_cut_the_length_cannot_change():
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        train(model, optimizer, EPOCH)
        ocsfast.step(model, 0.5, epochs=20)
        with pytest.raises(ConfigError, match=r"^epochs: not as in the first call"):
            ocsfast.step(model, 0.5, epochs=30)


def test_a_callback_is_told_epochs():
    """A run of which the framework knows a part: so many epochs, of the steps that it counts."""
    from ocsfast.integrations.run import PruneRun

    def planned(steps, each, **options):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        pruning = PruneRun(0.3, torch.zeros(2, 6), (), options)
        pruning.begin(model, sgd(model), steps, each)
        config = pruning.pruner.config
        return config.total_steps, config.epochs, config.check_every

    assert planned(300, 30) == (300, None, "auto")
    assert planned(300, 30, epochs=20) == (600, None, "auto")
    assert planned(None, 30, epochs=20) == (600, None, "auto")
    assert planned(300, 30, config=Config(epochs=20), check_every=4) == (600, None, 4)
    assert planned(300, 30, total_steps=900) == (900, None, "auto")
    assert planned(None, None, epochs=20) == (None, 20, "auto")  # refused at the first step
    assert planned(None, None) == (None, None, "auto")


def test_processes_have_to_agree_on_the_plan():
    facts = [
        run(total_steps=None, **plan)[2]._parts.facts()
        for plan in ({}, {"epochs": 20}, {"check_every": 9})
    ]
    assert facts[0] not in facts[1:]
    assert facts[1]["config"]["epochs"] == 20


def test_a_call_that_listened_before_the_attach_was_an_epoch():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, EPOCH)
    ocsfast.step(model, 0.5, epochs=20, **LATE)
    pruner = attach(model, optimizer, epochs=20, **LATE)
    uneven(pruner.step, 11, model, optimizer)
    assert (pruner.t_sl, pruner.t_cut) == (7, 11)  # of the calls that could be checks
