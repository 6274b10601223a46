"""What the log says at attach, at the begin of sparsity learning and at the cut; accuracy, units."""

import logging

import pytest
import torch
from helpers.networks import EPOCH, batch, epochs, net, sgd, train
from helpers.runs import attach, run

import ocsfast
from ocsfast import ConfigError
from ocsfast.core.families import Frozen
from ocsfast.run.messages import stays_dense


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "ocsfast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "ocsfast"]


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        (
            {},
            "from optimizer step 40 on at the latest, and the cut comes by optimizer step 60 of 100",
        ),
        (
            {"epochs": 20},
            "from epoch 8 on at the latest, and the cut comes by epoch 12 of 20",
        ),
        (
            {"epochs": 20, "sparsify_from": 3},
            "Groups shrink from check 3 on, and the cut",
        ),
        (
            {"epochs": 20, "strength": "paper"},
            "once the choice has settled, and the cut",
        ),
        ({"epochs": 20, "deadline": None}, "at the latest, of 20; there is no deadline for the cut"),
        ({"deadline": 9}, "The cut comes at check 9 at the latest"),
        ({"total_steps": None}, "Nothing tells yet how long the run is"),
    ],
)
def test_at_attach(options, plan, lines):
    if "epochs" in options:
        options = {"total_steps": None, **options}
    _, _, pruner = run(**options)
    first, second = lines()
    assert first.startswith(
        "attached: of 30 groups in 3 families 22 may go, with 90 % of 69.7 kMACs; 50 % is to go. "
    )
    assert plan in first
    assert second == "stays dense: 1 x model output (each is named at level DEBUG)"
    most = float(first.split("with ")[1].split(" %")[0]) / 100
    assert most == pytest.approx(ocsfast.inspect(net(), batch(0)[0]).largest_ratio, abs=5e-4)
    pruner.detach()


def test_at_attach_with_a_scheduler(lines):
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    pruner = attach(model, optimizer)
    assert "The stages will be planned by CosineAnnealingLR" in lines()[0]
    assert pruner.state_dict()["progress"]["position"] is None  # to be counted from the first check on
    assert scheduler.last_epoch == 0


def test_what_stays_dense_is_counted_by_reason(caplog):
    layers = [Frozen(f"a{k}", "no rule") for k in range(3)] + [Frozen("b", "model output")]
    assert stays_dense(layers).startswith("stays dense: 3 x no rule; 1 x model output (")
    many = [Frozen(str(k), f"reason {k}") for k in range(8)]
    assert stays_dense(many).endswith("1 x reason 4; 3 x other reasons (each is named at level DEBUG)")
    with caplog.at_level(logging.DEBUG, "ocsfast"):
        run()
    details = [r for r in caplog.records if "fc2 stays dense: model output" in r.getMessage()]
    assert [r.levelname for r in details] == ["DEBUG"]


def test_from_begin_to_cut(lines):
    model, optimizer, pruner = run()
    for epoch in range(14):
        train(model, optimizer, EPOCH, first=epoch * EPOCH)
        report = pruner.step(accuracy=50 + epoch)
        assert report.accuracy == 50 + epoch
    cut = next(r for r in pruner.history if r.cut)
    gone = sum(size - kept for _, kept, size in cut.kept)
    begin, end, *more = lines()[2:]
    assert all(line.startswith("the cut takes ") for line in more)
    assert begin == (
        f"sparsity learning begins at check {pruner.t_sl} (optimizer step {pruner.t_sl * EPOCH}): "
        f"{gone} of 30 groups shrink, over 20 steps as planned"
    )
    assert end == (
        f"cut at check {pruner.t_cut}: {100 * (1 - cut.cost / 69650):.3g} % of 69.7 kMACs is gone (50 % "
        f"was asked for), {cut.cost / 1000:.3g} kMACs stay; "
        f"the accuracy told last is {49 + pruner.t_cut}"
    )
    assert [r.accuracy for r in pruner.history] == [50 + k for k in range(pruner.t_cut)]
    state = pruner.state_dict()
    fresh = run()
    other = fresh[2]
    other.load_state_dict(state)
    assert other.history == pruner.history
    assert other.step() == pruner.step(accuracy=pruner.history[-1].accuracy)


def test_accuracy_is_kept_until_the_next_is_told():
    model, optimizer, pruner = run(check_every=2)
    told, kept = [None, torch.tensor(0.5), None, 0.25, None], []
    for k, accuracy in enumerate(told):
        train(model, optimizer, 1, first=k)
        kept.append(pruner.step(accuracy).accuracy)
    assert kept == [None, 0.5, 0.5, 0.25, 0.25]
    assert [r.accuracy for r in pruner.history] == [0.5, 0.25]
    assert type(pruner.history[0].accuracy) is float
    with pytest.raises(ConfigError, match="accuracy='good': a number is expected"):
        ocsfast.step(model, 0.5, accuracy="good")


def test_no_report_divides_by_zero():
    model = net()
    optimizer = sgd(model)
    weights = sum(p.numel() for p in model.parameters())
    train(model, optimizer, EPOCH)
    first = ocsfast.step(model, 0.5, accuracy=0.1)
    assert (first.cost, first.cost_at_cut, first.cost_dense) == (weights, weights, weights)
    assert (first.unit, first.check, first.accuracy) == ("parameters", 0, 0.1)
    train(model, optimizer, EPOCH)
    second = ocsfast.step(model, 0.5)
    assert (second.unit, second.cost_dense) == ("MACs", 69650)


@pytest.mark.parametrize(
    ("target", "unit"),
    [("flops", "MACs"), ("params", "parameters"), ("bytes", "bytes"), (lambda f: f.macs, "cost units")],
)
def test_units(target, unit):
    model, optimizer, pruner = run(target=target)
    reports = [pruner.step(), *epochs(model, optimizer, pruner, 2), pruner.cut(), pruner.step()]
    assert [r.unit for r in reports] == [unit] * 5
    assert all(r.cost_dense > 0 for r in reports)


def test_a_callback_reports_before_it_has_attached():
    from ocsfast.integrations.run import PruneRun

    class Odd(torch.optim.SGD):
        """Of a class that only a first step makes known."""

    model = net()
    pruning = PruneRun(0.5, batch(0)[0], (), {})
    pruning.begin(model, Odd(model.parameters(), lr=0.1), 100)
    assert pruning.pruner is None
    assert pruning.report.cost_dense == sum(p.numel() for p in model.parameters())
