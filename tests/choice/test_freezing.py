"""What is frozen in mid-run keeps its shape and its bits; what thaws may go again."""

import logging

import pytest
import torch
from helpers.networks import Net, batch, net, sgd, train
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.optim import SGD, AdamW

OPTIMIZERS = [
    lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9),
    lambda m: AdamW(m.parameters(), lr=0.01),
]
RUN = {"total_steps": 40, "check_every": 1, "sparsify_from": 2, "deadline": 30, "max_residual": 1e-9}


def bits(layer):
    return [p.detach().clone() for p in layer.parameters()]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adamw", "own sgd", "own adamw"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_layer_that_is_frozen_keeps_its_shape_and_its_bits(make, capturable):
    model = Net((16, 24, 20))
    optimizer = make(model)
    x, _ = batch(0)
    options = {**RUN, "capturable": capturable}
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x, **options)
    for k in range(10):  # the second check begins to shrink
        train(model, optimizer, 1, first=k)
        pruner.step()
    assert pruner.stage == "sparsify"
    f = [family.name for family in pruner.families.families].index("conv2")
    family = pruner.families.families[f]
    assert bool(pruner.mask[family.first : family.first + family.size].any())
    model.fc1.requires_grad_(False)
    kept = bits(model.fc1)
    for k in range(10, 40):
        train(model, optimizer, 1, first=k)
        report = pruner.step()
    assert report.stage == "pruned"
    assert report.cost <= 0.5 * report.cost_dense
    for before, now in zip(kept, model.fc1.parameters(), strict=True):
        assert torch.equal(before, now)
    assert model.conv2.weight.shape[0] == 24  # fc1 reads its channels
    assert model.conv1.weight.shape[0] < 16
    assert {f.where for f in report.frozen if f.reason == "requires_grad=False"} == {"conv2", "fc1"}
    model(x).sum().backward()
    optimizer.step()


def test_a_freeze_between_two_checks_loses_no_count():
    """Steps that a device counts go on being counted."""
    for capturable in (False, True):
        model = Net((16, 24, 20))
        optimizer, (x, _) = sgd(model), batch(0)
        options = {**RUN, "total_steps": 100, "capturable": capturable}
        pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x, **options)
        for k in range(6):
            train(model, optimizer, 4, first=10 * k)
            model.fc1.requires_grad_(k != 4)
            train(model, optimizer, 6, first=10 * k + 4)
            report = pruner.step()
        assert pruner.steps == 60
        if not capturable:
            expected = report.nats
    assert report.nats == pytest.approx(expected, rel=1e-5)
    assert report.nats > 0


def test_what_thaws_may_go_again():
    model = Net((16, 24, 20))
    optimizer, (x, _) = sgd(model), batch(0)
    pruner = ocsfast.attach(model, 0.6, optimizer=optimizer, example_inputs=x, **RUN)
    for k in range(40):
        model.conv2.requires_grad_(not 4 <= k < 15)
        train(model, optimizer, 1, first=k)
        report = pruner.step()
        if 4 <= k < 15:
            assert {n: kept for n, kept, _ in report.kept}["conv2"] == 24
    assert report.stage == "pruned"
    assert report.cost <= 0.4 * report.cost_dense
    assert model.conv2.weight.shape[0] < 24


def test_a_ratio_out_of_reach_is_said_and_waited_for(caplog):
    model = Net((16, 24, 20))
    optimizer, (x, _) = sgd(model), batch(0)
    pruner = ocsfast.attach(model, 0.6, optimizer=optimizer, example_inputs=x, **RUN)
    for layer in (model.conv1, model.conv2, model.fc1):
        layer.requires_grad_(False)
    for k in range(35):  # the deadline passes: there is nothing to cut
        train(model, optimizer, 1, first=k)
        report = pruner.step()
    assert report.stage == "observe"
    assert model.conv2.weight.shape[0] == 24
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING and "frozen" in r.message]
    assert len(said) == 1
    assert "ratio=0.6 cannot be reached" in said[0]
    with pytest.raises(StateError, match="all that might go is frozen"):
        pruner.cut()
    model.requires_grad_(True)
    train(model, optimizer, 1)
    assert pruner.cut().cost <= 0.4 * report.cost_dense


def test_a_cut_short_of_the_ratio_is_what_may_go():
    model = Net((16, 24, 20))
    optimizer, (x, _) = sgd(model), batch(0)
    pruner = ocsfast.attach(model, 0.7, optimizer=optimizer, example_inputs=x, **RUN)
    model.conv2.requires_grad_(False)
    for k in range(29):
        train(model, optimizer, 1, first=k)
        assert pruner.step().stage != "pruned"  # ready or not: too little would go
    train(model, optimizer, 1, first=29)
    report = pruner.step()
    assert report.cut
    assert report.cost > 0.3 * report.cost_dense
    assert model.fc1.weight.shape[0] == 5  # the most that max_family_ratio lets go


def test_families_of_one_count_are_held_together():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    torch.manual_seed(0)
    model = Twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = ocsfast.attach(
        model, 0.3, optimizer=optimizer, example_inputs=torch.randn(2, 8), uniform=True
    )
    model.a.requires_grad_(False)
    with pytest.raises(StateError, match="frozen"):
        pruner.cut()


def test_frozen_from_the_start(caplog):
    model = net()
    model.fc1.requires_grad_(False)
    optimizer, (x, _) = sgd(model), batch(0)
    with pytest.raises(ConfigError, match="requires_grad"):
        ocsfast.attach(model, 0.9, optimizer=optimizer, example_inputs=x)
    pruner = ocsfast.attach(model, 0.2, optimizer=optimizer, example_inputs=x)
    model.requires_grad_(True)
    train(model, optimizer, 1)
    pruner.cut()
    said = [r.message for r in caplog.records if "train now, and stay dense" in r.message]
    assert len(said) == 1
    assert said[0].startswith("2 parameters")
    assert model.fc1.weight.shape == (10, 48)
    assert model.conv1.weight.shape[0] < 8
