"""Finding the optimizer, and judging whether its state can be cut."""

import gc

import pytest
import torch
from networks import OPTIMIZERS, batch, net, sgd, train
from torch import nn

import ocsfast
from ocsfast import StateError
from ocsfast.optimizers import (
    SUPPORTED,
    TORCHS,
    StepCounter,
    check_owner,
    check_supported,
    find_optimizer,
    momentum_gain,
)
from ocsfast.slicing import unsliceable


def parameters(model):
    return dict(model.named_parameters())


def test_finds_the_owner_by_its_steps_and_forgets_dead_ones():
    counter = StepCounter()
    model = net()
    optimizer = sgd(model)
    with pytest.raises(StateError, match="no optimizer step has been seen"):
        find_optimizer(counter, parameters(model))
    counter(optimizer, (), {})
    counter(sgd(net()), (), {})
    assert find_optimizer(counter, parameters(model)) is optimizer
    assert counter.steps(optimizer) == 1
    del optimizer
    gc.collect()
    with pytest.raises(StateError, match="no optimizer step"):
        find_optimizer(counter, parameters(model))


def test_two_owners_are_refused():
    counter = StepCounter()
    model = net()
    both = [sgd(model), torch.optim.Adam(model.parameters())]
    for optimizer in both:
        counter(optimizer, (), {})
    with pytest.raises(StateError, match=r"2 optimizers own .*SGD, Adam"):
        find_optimizer(counter, parameters(model))


def test_a_parameter_that_is_not_owned_is_named():
    model = net()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "bn1.weight"], lr=0.1)
    with pytest.raises(StateError, match=r"bn1\.weight"):
        check_owner(optimizer, parameters(model))


@pytest.mark.parametrize("kind", TORCHS)
def test_torchs_own_are_known_before_their_first_step_and_cut(kind):
    model = net()
    optimizer = kind(model.parameters(), lr=0.01)
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
    train(model, optimizer, 2)
    pruner.cut()
    train(model, optimizer, 2, first=2)
    for parameter, state in optimizer.state.items():
        assert unsliceable(optimizer) is None, (parameter.shape, state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_supported_before_the_first_step(name):
    optimizer = OPTIMIZERS[name](net())
    assert type(optimizer) in SUPPORTED
    check_supported(optimizer, stepped=False)


def test_others_are_judged_by_their_state():
    class Mine(torch.optim.Adamax):
        pass

    model = net()
    mine = Mine(model.parameters())
    with pytest.raises(StateError, match="Mine is not one of"):
        check_supported(mine, stepped=False)
    train(model, mine, 1)
    check_supported(mine, stepped=True)

    adafactor = torch.optim.Adafactor(model.parameters())
    train(model, adafactor, 1)
    check_supported(adafactor, stepped=True)
    adafactor.state[model.fc1.weight]["odd"] = torch.zeros(7)
    with pytest.raises(StateError, match="Adafactor cannot be cut: its state 'odd'"):
        check_supported(adafactor, stepped=True)


def test_a_subclass_is_not_taken_for_its_base():
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(StateError, match="Mine"):
        check_supported(Mine(nn.Linear(2, 2).parameters(), lr=0.1), stepped=False)


def test_momentum_gain():
    assert momentum_gain({"momentum": 0.9, "dampening": 0}) == pytest.approx(0.1)
    assert momentum_gain({"momentum": 0.9, "dampening": 0.9}) == pytest.approx(1.0)
    assert momentum_gain({"betas": (0.9, 0.999)}) == 1.0
