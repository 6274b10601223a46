"""When checks, sparsity learning and the deadline fall, and what a run of unknown length is told."""

import logging

import pytest
import torch
from helpers.networks import EPOCH, epochs, net, sgd, train
from helpers.runs import attach, run

import ocsfast
from ocsfast import ConfigError


@pytest.mark.parametrize(
    ("most", "level", "told"),
    [
        (1e-9, "WARNING", "with groups that are not fully shrunk: the groups that go have 0.0218 of"),
        (0.9, "INFO", "(below max_residual=0.9: it is harmless)"),
        (None, "INFO", "(any is allowed)"),
    ],
)
def test_the_deadline_cuts_and_says_so(most, level, told, caplog, monkeypatch):
    monkeypatch.setattr("ocsfast.choice.stability.is_stable", lambda *indices: False)
    model, optimizer, pruner = run(max_residual=most, deadline=7)
    with caplog.at_level(logging.INFO, "ocsfast"):
        reports = epochs(model, optimizer, pruner, 8)
    assert [r.cut for r in reports] == [False] * 6 + [True, False]
    assert reports[6].forced
    (said,) = [r for r in caplog.records if "the plan's deadline has come at check 7" in r.getMessage()]
    assert said.levelname == level
    assert told in said.getMessage()
    assert ("larger span= or nats=" in said.getMessage()) == (level == "WARNING")


def test_the_stage_starts_in_time_for_a_deadline_as_a_share(caplog):
    model, optimizer, pruner = run(tau=0.0, epsilon=0.0, max_residual=1e-9, lag=9)
    reports = epochs(model, optimizer, pruner, 13)
    assert pruner.t_sl == 8  # 0.6 - 0.2 of 20 epochs, as Eq. 5 cannot be judged by then
    assert pruner.t_cut == 12
    assert reports[11].forced
    assert reports[11].nats == pytest.approx(3.0)


def test_the_scheduler_tells_the_length():
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    pruner = attach(model, optimizer, lag=9, epsilon=0.0, max_residual=1e-9)
    for e in range(12):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        scheduler.step()
        pruner.step()
    assert (pruner.t_sl, pruner.t_cut) == (8, 12)


UNKNOWN = "nothing tells how long this run is"


@pytest.fixture
def never_stable(monkeypatch):
    """Only the plan's own limits begin a stage or end it."""
    for name in ("has_settled", "is_stable"):
        monkeypatch.setattr(f"ocsfast.choice.stability.{name}", lambda *indices: False)


def unknown_length(caplog):
    return [r for r in caplog.records if UNKNOWN in r.getMessage()]


def test_a_run_of_unknown_length_says_what_it_plans(caplog, never_stable):
    """At the first check, and it comes as it was said."""
    model = net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer)
    epochs(model, optimizer, pruner, 1)
    (said,) = unknown_length(caplog)
    assert said.levelname == "WARNING"
    told = "groups shrink from call 24 of step on, and the cut comes at call 72 of step, at the latest"
    assert told in said.getMessage()
    assert "Pass epochs= (step is called once in each) or total_steps=" in said.getMessage()
    epochs(model, optimizer, pruner, 71, first=1)
    assert unknown_length(caplog) == [said]
    assert (pruner.t_sl, pruner.t_cut) == (24, 72)


def test_the_call_that_only_listens_is_counted(caplog, never_stable):
    """The call that only listens is one of those that are counted."""
    model = net()
    optimizer = sgd(model)
    calls = []
    for k in range(72):
        train(model, optimizer, EPOCH, first=k * EPOCH)
        calls.append(ocsfast.step(model, 0.5).stage)
    (said,) = unknown_length(caplog)
    assert "from call 24 of step on, and the cut comes at call 72 of step" in said.getMessage()
    assert calls.index("sparsify") + 1 == 24
    assert calls.index("pruned") + 1 == 72


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"check_every": 5}, "groups shrink from check 24 on, and the cut comes at check 72"),
        ({"check_every": 5, "sparsify_from": 6}, "from check 6 on, and the cut comes at check 18"),
        ({"check_every": 5, "strength": "paper"}, "groups shrink once the choice has settled, and the"),
    ],
)
def test_a_plan_by_checks_is_told_in_checks(options, told, caplog):
    model, optimizer, pruner = run(total_steps=None, tau=0.0, epsilon=0.0, **options)
    for k in range(10):
        train(model, optimizer, 1, first=k)
        pruner.step()
    (said,) = unknown_length(caplog)
    assert told in said.getMessage()


@pytest.mark.parametrize("moved", [True, False])
def test_a_scheduler_that_moves_after_the_call_is_waited_for(moved, caplog):
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    pruner = attach(model, optimizer, tau=0.0, epsilon=0.0)
    for e in range(4):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        pruner.step()
        assert len(unknown_length(caplog)) == (0 if moved or e == 0 else 1)
        if moved:
            scheduler.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"total_steps": None, "epochs": 20}, {"total_steps": None, "deadline": 9}, {"deadline": None}],
)
def test_a_run_that_is_planned_has_nothing_to_warn_of(options, caplog):
    epochs(*run(**options), 5)
    assert unknown_length(caplog) == []


def test_check_every_counts_optimizer_steps():
    model, optimizer, pruner = run(check_every=4)
    checks = []
    for k in range(13):
        train(model, optimizer, 1, first=k)
        checks.append(pruner.step().check)
    assert checks == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_inner_loop_calls_check_once_per_five_hundred(monkeypatch):
    monkeypatch.setattr("ocsfast.run.timetable.INNER_LOOP_STEPS", 6)
    model, optimizer, pruner = run(total_steps=None)
    checks = []
    for k in range(13):
        train(model, optimizer, 1, first=k)
        checks.append(pruner.step().check)
    assert checks == [0] * 5 + [1] * 6 + [2] * 2


def test_inner_loop_calls_check_fifty_times_in_a_run_of_known_length():
    model, optimizer, pruner = run(total_steps=150)
    for k in range(12):
        train(model, optimizer, 1, first=k)
        assert pruner.step().check == (k + 1) // 3


def test_a_length_that_is_over_already_is_refused():
    model, optimizer, pruner = run(total_steps=2)
    train(model, optimizer, 3)
    with pytest.raises(ConfigError, match="total_steps=2, but the optimizer has taken 3 already"):
        pruner.step()
    assert not pruner.history
