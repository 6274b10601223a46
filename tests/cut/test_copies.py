"""What follows the cut besides the model: averages of it, and optimizers of every kind."""

import copy

import pytest
import torch
from helpers.networks import Net, batch, net, sgd, train
from helpers.runs import attach
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ocsfast
from ocsfast import StateError
from ocsfast.grouping import engines


def ema_of(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


@pytest.mark.parametrize("make", [ema_of, AveragedModel, copy.deepcopy], ids=["ema", "swa", "copy"])
def test_an_average_is_cut_with_the_model(make):
    model = net()
    optimizer = sgd(model)
    average = make(model)
    train(model, optimizer, 3)
    if isinstance(average, AveragedModel):
        average.update_parameters(model)
    pruner = attach(model, optimizer, also=[average])
    inside = getattr(average, "module", average)
    dense = copy.deepcopy(inside)
    pruner.cut()
    assert inside.conv2.weight.shape == model.conv2.weight.shape
    # The same groups: cutting the copy by itself gives the same function.
    ocsfast.cut_model(dense, pruner.families, pruner.mask)
    x = batch(1)[0]
    assert torch.equal(inside.eval()(x), dense.eval()(x))
    train(model, optimizer, 2, first=3)
    if isinstance(average, AveragedModel):
        average.update_parameters(model)


def test_the_average_of_cut_models_is_the_cut_average():
    """Averaging and cutting commute: weights of the average, cut, are averages of cut weights."""
    torch.manual_seed(0)
    models = [net(seed) for seed in range(3)]
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    families = engines.group(models[0], (batch(0)[0],))
    pruned = torch.rand(families.num_groups) < 0.4
    ocsfast.cut_model(average.module, families, pruned)
    cut_first = None
    for model in models:
        ocsfast.cut_model(model, families, pruned)
        cut_first = AveragedModel(model) if cut_first is None else cut_first
        cut_first.update_parameters(model)
    x = batch(1)[0]
    torch.testing.assert_close(average.eval()(x), cut_first.eval()(x))


def test_timms_average_is_cut_with_the_model():
    timm = pytest.importorskip("timm.utils")
    model = net()
    optimizer = sgd(model)
    average = timm.ModelEmaV3(model, decay=0.9)
    pruner = attach(model, optimizer, also=[average])
    train(model, optimizer, 3)
    average.update(model)
    pruner.cut()
    train(model, optimizer, 3)
    average.update(model)
    assert average.module.fc1.weight.shape == model.fc1.weight.shape
    average(batch(0)[0])


def test_copies_resume_too():
    model = net()
    optimizer = sgd(model)
    average = ema_of(model)
    pruner = attach(model, optimizer, also=[average])
    train(model, optimizer, 3)
    average.update_parameters(model)
    pruner.cut()
    other = net(seed=3)
    other_optimizer = sgd(other)
    other_average = ema_of(other)
    resumed = attach(other, other_optimizer, also=[other_average])
    other_average.load_state_dict(average.state_dict())  # the copy first: the model follows
    assert other.conv1.out_channels == model.conv1.out_channels
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(pruner.state_dict())
    x = batch(1)[0]
    assert torch.equal(other_average(x), average(x))


class ListAverage:
    """As diffusers' EMAModel and torch_ema: the averages in a list, other weights stored meanwhile."""

    def __init__(self, parameters, decay=0.9, trained_only=False):
        self.decay, self.trained_only = decay, trained_only
        self.shadow_params = [p.clone().detach() for p in self.followed(parameters)]
        self.temp_stored_params = None

    def followed(self, parameters):
        return [p for p in parameters if p.requires_grad or not self.trained_only]

    @torch.no_grad()
    def step(self, parameters):
        for average, p in zip(self.shadow_params, self.followed(parameters), strict=True):
            if p.requires_grad:
                average.sub_((1 - self.decay) * (average - p))
            else:
                average.copy_(p)

    def to(self, dtype):
        self.shadow_params = [p.to(dtype=dtype) for p in self.shadow_params]

    def store(self, parameters):
        self.temp_stored_params = [p.detach().cpu().clone() for p in parameters]

    def copy_to(self, parameters):
        for average, p in zip(self.shadow_params, self.followed(parameters), strict=True):
            p.data.copy_(average.data)


class HoldsAnother:
    """As ultralytics' ModelEMA: no module, but the average is one among its attributes."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model).eval()
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        state = model.state_dict()
        for name, value in self.ema.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(0.9).add_(state[name], alpha=0.1)


@pytest.mark.parametrize("trained_only", [False, True])
def test_averages_in_a_list_are_cut(trained_only):
    model = net()
    model.fc2.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ema = ListAverage(model.parameters(), trained_only=trained_only)
    pruner = attach(model, optimizer, also=[ema])
    train(model, optimizer, 3)
    ema.step(model.parameters())
    ema.store(model.parameters())
    ema.to(torch.float64)  # makes other tensors: they are looked for when the cut comes
    held = [id(p) for p in ema.shadow_params]
    whole = copy.deepcopy(model)
    ema.copy_to(whole.parameters())
    pruner.cut()
    ocsfast.cut_model(whole, pruner.families, pruner.mask)
    assert [id(p) for p in ema.shadow_params] == held
    followed = ema.followed(whole.parameters())
    for average, p in zip(ema.shadow_params, followed, strict=True):
        assert average.dtype == torch.float64
        assert torch.equal(average.float(), p)
    for stored, p in zip(ema.temp_stored_params, model.parameters(), strict=True):
        assert torch.equal(stored, p)
    train(model, optimizer, 2, first=3)
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    model(batch(0)[0])


def test_a_list_resumes_after_the_model():
    model, other = net(), net(seed=3)
    emas = [ListAverage(m.parameters()) for m in (model, other)]
    pruners = [attach(m, sgd(m), also=[e]) for m, e in zip((model, other), emas, strict=True)]
    pruners[0].cut()
    other.load_state_dict(model.state_dict())
    shapes = [[p.shape for p in ema.shadow_params] for ema in emas]
    assert shapes[0] == shapes[1]
    early = net(seed=4)
    ema = ListAverage(early.parameters())
    held = attach(early, sgd(early), also=[ema])
    ema.shadow_params = [p.clone() for p in emas[0].shadow_params]
    with pytest.raises(StateError, match=r"its shadow_params has .* load the model's weights first"):
        early.load_state_dict(model.state_dict())
    assert held.stage == "observe"


def test_a_copy_among_an_objects_attributes_is_cut():
    model = net()
    optimizer = sgd(model)
    ema = HoldsAnother(model)
    ema.model = model  # which is cut as it is, once
    pruner = attach(model, optimizer, also=[ema])
    train(model, optimizer, 2)
    ema.update(model)
    dense = copy.deepcopy(ema.ema)
    pruner.cut()
    ocsfast.cut_model(dense, pruner.families, pruner.mask)
    x = batch(1)[0]
    assert torch.equal(ema.ema(x), dense(x))
    train(model, optimizer, 2, first=2)
    ema.update(model)


class Remembers:
    """An average that keeps the tensors of both sides from its first update on."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model)
        self.pairs = None

    def update(self, model):
        if self.pairs is None:
            ours, theirs = self.ema.state_dict(), model.state_dict()
            names = [name for name in ours if ours[name].is_floating_point()]
            self.pairs = [ours[name] for name in names], [theirs[name] for name in names]
        torch._foreach_lerp_(*self.pairs, 0.5)


def test_an_average_that_remembers_tensors_goes_on():
    model = net()
    optimizer, average = sgd(model), Remembers(model)
    pruner = attach(model, optimizer, also=[average])
    train(model, optimizer, 2)
    average.update(model)
    pruner.cut()
    train(model, optimizer, 2, first=2)
    before = {name: t.clone() for name, t in average.ema.state_dict().items()}
    average.update(model)
    for name, theirs in model.state_dict().items():
        if theirs.is_floating_point():
            wanted = (before[name] + theirs) / 2
            torch.testing.assert_close(average.ema.state_dict()[name], wanted)
    assert not torch.equal(average.ema.conv2.weight, before["conv2.weight"])


class Gives:
    """Only a method gives the averages."""

    def __init__(self, model):
        self._inside = (tuple(p.detach().clone() for p in model.parameters()),)
        self.own = list(model.parameters())

    def parameters(self):
        return iter(self._inside[0])


FORMS = {
    "a list": lambda model: [p.detach().clone() for p in model.parameters()],
    "a tuple": lambda model: tuple(p.detach().clone() for p in model.parameters()),
    "a dict": lambda model: {n: p.detach().clone() for n, p in model.named_parameters()},
    "a state dict": lambda model: {n: t.clone() for n, t in model.state_dict().items()},
    "parameters()": Gives,
    "a ParameterList": lambda model: nn.ParameterList(p.detach().clone() for p in model.parameters()),
}


@pytest.mark.parametrize("form", FORMS)
def test_copies_may_be_tensors_themselves(form):
    model = net()
    optimizer = sgd(model)
    average = FORMS[form](model)
    if isinstance(average, dict):
        tensors, names = list(average.values()), list(average)
    else:
        tensors = list(average.parameters() if hasattr(average, "parameters") else average)
        names = [name for name, _ in model.named_parameters()]
    attach(model, optimizer, also=[average]).cut()
    for tensor, name in zip(tensors, names, strict=True):
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_list_is_as_it_was_where_the_cut_fails(monkeypatch):
    model = net()
    optimizer = sgd(model)
    ema = ListAverage(model.parameters())
    pruner = attach(model, optimizer, also=[ema])
    before = [p.clone() for p in ema.shadow_params]
    with monkeypatch.context() as patch:
        patch.setattr(pruner._processes, "rebuild", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pruner.cut()
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, before, strict=True))
    ema.shadow_params[2] = torch.zeros(3)
    with pytest.raises(StateError, match=r"its shadow_params has \(3,\) where bn1\.weight is \(8,\)"):
        pruner.cut()
    assert model.conv1.weight.shape == (8, 3, 3, 3)


def test_what_holds_no_copy_is_refused():
    model = net()
    optimizer = sgd(model)
    frozen = net()
    frozen.fc2.bias.requires_grad_(False)
    own = Gives(model)
    own._inside = (tuple(model.parameters()),)
    for bad, said in (
        (AveragedModel(Net((8, 12, 11))), "AveragedModel in which nothing"),
        (nn.Linear(2, 2), "Linear in which nothing"),
        ("ema", "also= holds a str"),
        ([], "also= holds a list"),
        (ListAverage(Net((8, 12, 11)).parameters()), r"its shadow_params has \(11, 48\) where fc1"),
        (ListAverage(frozen.parameters(), trained_only=True), "of its 11 parameters in order"),
        (own, "also= holds a Gives"),
    ):
        with pytest.raises(StateError, match=said):
            attach(model, optimizer, also=[bad])
    attach(model, optimizer)  # nothing was left behind


# Optimizers whose state has shapes of its own.
