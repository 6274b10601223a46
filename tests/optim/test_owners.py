"""Finding the optimizer, and judging whether its state can be cut."""

import gc

import pytest
import torch
from helpers.networks import OPTIMIZERS, batch, net, sgd, train
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast import StateError
from ocsfast.cut.optimizer_state import unsliceable
from ocsfast.optim.owners import SUPPORTED, TORCHS, StepCounter, check_supported, find_optimizer
from ocsfast.optim.param_groups import momentum_gain


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


def test_two_owners_of_the_same_parameters():
    counter = StepCounter()
    model = net()
    both = [sgd(model), torch.optim.Adam(model.parameters())]
    for optimizer in both:
        counter(optimizer, (), {})
    with pytest.raises(StateError, match=r"2 optimizers own .*SGD, Adam.* the same ones.* optimizer="):
        find_optimizer(counter, parameters(model))


def split(model, own):
    """An SGD for the parameters whose names `own` accepts, an AdamW for the rest."""
    named = list(model.named_parameters())
    mine = [p for n, p in named if own(n)]
    rest = [p for n, p in named if not own(n)]
    return torch.optim.SGD(mine, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)


def stepped(model, optimizers):
    for optimizer in optimizers:
        train(model, optimizer, 1)


def test_two_owners_of_a_part_each():
    """The message leads to something that works: the other's layers stay dense."""
    model = net()
    body, head = split(model, lambda name: not name.startswith("fc2"))
    stepped(model, (body, head))
    said = r"each a part.*keep=\['fc2.weight', 'fc2.bias'\]"
    with pytest.raises(StateError, match=said):
        ocsfast.step(model, 0.3)
    here = {"example_inputs": batch(0)[0], "total_steps": 50}
    said = (
        r"fc2\.weight is to be .* SGD .*: the AdamW optimizer does\..*or leave .*keep=\['fc2.weight'\]"
    )
    with pytest.raises(StateError, match=said):
        ocsfast.attach(model, 0.3, optimizer=body, **here)
    pruner = ocsfast.attach(model, 0.3, optimizer=body, keep=["fc2.weight", "fc2.bias"], **here)
    pruner.cut()
    stepped(model, (body, head))
    assert model.conv1.out_channels + model.conv2.out_channels < 8 + 12
    assert model.fc2.in_features == 10


def test_two_owners_of_the_same_layers():
    """Matrices to one, biases and norms to the other: keep= would leave nothing, one optimizer does."""
    model = net()
    matrices = {id(p) for p in model.parameters() if p.dim() > 1}
    muon, rest = split(model, lambda name: id(parameters(model)[name]) in matrices)
    stepped(model, (muon, rest))
    with pytest.raises(StateError, match=r"each a part.*they share layers, as Muon.*only the first"):
        ocsfast.step(model, 0.3)
    here = {"example_inputs": batch(0)[0], "total_steps": 50}
    with pytest.raises(StateError) as refused:
        ocsfast.attach(model, 0.3, optimizer=muon, **here)
    said = str(refused.value)
    assert said.startswith(
        "conv1.bias and 5 more are to be pruned, but the SGD optimizer does not own them"
    )
    assert said.endswith(
        "param groups: every layer to be pruned has parameters in both, so keep= would leave none"
    )
    names = [n for n, p in model.named_parameters() if id(p) not in matrices]
    with pytest.raises(ocsfast.GroupingError, match="nothing in this model can be pruned"):
        ocsfast.attach(model, 0.3, optimizer=muon, keep=names, **here)
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in matrices) is own]}
        for own in (True, False)
    ]
    one = torch.optim.SGD(groups, lr=0.05)
    del muon, rest
    ocsfast.attach(model, 0.3, optimizer=one, **here).cut()
    stepped(model, [one])


def test_two_owners_of_a_module_each():
    """A generator and a discriminator in one module: the message leads to a cut of each."""

    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
            self.critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(), nn.Linear(16, 1))

        def forward(self, noise):
            return self.critic(self.generator(noise))

    torch.manual_seed(0)
    gan, real = Gan(), torch.randn(32, 6)
    parts = (gan.generator, gan.critic)
    making, judging = (torch.optim.Adam(part.parameters(), lr=1e-2) for part in parts)

    def epoch():
        for _ in range(4):
            noise = torch.randn(32, 4)
            judging.zero_grad()
            fake = gan.critic(gan.generator(noise).detach())
            (F.softplus(fake) + F.softplus(-gan.critic(real))).mean().backward()
            judging.step()
            making.zero_grad()
            F.softplus(-gan(noise)).mean().backward()
            making.step()

    epoch()
    said = r"each a part.*: ocsfast.step\(model.critic, ...\) and ocsfast.step\(model.generator, ...\)"
    with pytest.raises(StateError, match=said):
        ocsfast.step(gan, 0.5)
    for _ in range(10):
        reports = [ocsfast.step(part, 0.5, epochs=10) for part in parts]
        epoch()
    assert [report.stage for report in reports] == ["pruned", "pruned"]
    assert [part[0].out_features for part in parts] == [8, 8]


def test_a_parameter_that_nobody_owns_is_named():
    model = net()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "bn1.weight"], lr=0.1)
    with pytest.raises(
        StateError, match=r"bn1\.weight is to be .*Add what is missing.* keep=\['bn1\.weight'\]"
    ):
        ocsfast.attach(model, 0.3, optimizer=optimizer, example_inputs=batch(0)[0])


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
