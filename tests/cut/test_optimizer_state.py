"""State of optimizers that has shapes of its own is cut with its parameters."""

import copy

import pytest
import torch
from helpers.networks import batch, net, train
from helpers.runs import attach
from torch import nn

import ocsfast
from ocsfast import StateError


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_((0.9 * average + 0.1 * p.grad).sign(), alpha=-group["lr"])
                average.lerp_(p.grad, 0.01)


class Shampoo(torch.optim.Optimizer):
    """One preconditioner a dimension: a list of square matrices."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["preconditioners"] = [torch.eye(n) for n in p.shape]
                state["step"] += 1
                grad = p.grad
                for axis, matrix in enumerate(state["preconditioners"]):
                    rows = p.grad.movedim(axis, 0).reshape(p.shape[axis], -1)
                    matrix += rows @ rows.T
                    values, vectors = torch.linalg.eigh(matrix)
                    root = vectors * values.clamp(min=1e-6) ** (-0.5 / p.dim()) @ vectors.T
                    grad = torch.tensordot(root, grad, ([1], [axis])).movedim(0, axis)
                p.sub_(grad, alpha=group["lr"])


def square(key, value, shape, kept):
    """A preconditioner of axis k has that axis's size twice."""
    stays = kept.get(int(key.removeprefix("preconditioners[").removesuffix("]")))
    return value if stays is None else value[stays][:, stays]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around another optimizer, with state of its own."""

    def __init__(self, params, base, rho=0.05):
        self.base = base(params)
        super().__init__(self.base.param_groups, {"rho": rho})
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=0.05 / float(p.grad.norm() + 1e-12))
        with torch.enable_grad():
            closure()
        for p, state in self.state.items():
            p.copy_(state["old"])
        self.base.step()


def hugging_face_adafactor(model):
    transformers = pytest.importorskip("transformers.optimization")
    if not hasattr(transformers, "Adafactor"):
        pytest.skip("this transformers has no Adafactor")
    return transformers.Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False
    )


def timm_optimizer(name):
    def make(model):
        optim = pytest.importorskip("timm.optim")
        return optim.create_optimizer_v2(model, opt=name, lr=1e-3)

    return make


MAKERS = {
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "transformers Adafactor": hugging_face_adafactor,
    "Lion": lambda model: Lion(model.parameters()),
    **{f"timm {n}": timm_optimizer(n) for n in ("lion", "lars", "muon", "adafactor", "lamb", "adopt")},
}


@pytest.mark.parametrize("name", MAKERS)
def test_optimizers_go_on_after_the_cut(name):
    model = net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, 2)
    pruner = attach(model, optimizer)
    pruner.cut()
    shapes = {
        key: tuple(value.shape)
        for key, value in optimizer.state[model.conv2.weight].items()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    }
    train(model, optimizer, 3, first=2)
    after = optimizer.state[model.conv2.weight]
    assert {key: tuple(after[key].shape) for key in shapes} == shapes
    fresh = MAKERS[name](small := copy.deepcopy(model))
    train(small, fresh, 1)  # what it makes by itself for the small model has the same shapes
    made = fresh.state[small.conv2.weight]
    assert {key: tuple(made[key].shape) for key in shapes} == shapes


def test_a_registered_slicer_cuts_what_it_knows():
    model = net()
    optimizer = Shampoo(model.parameters())
    train(model, optimizer, 2)
    with pytest.raises(StateError, match="Shampoo cannot be cut: its state 'preconditioners'"):
        attach(model, optimizer)
    ocsfast.register_slicer(Shampoo, square)
    pruner = attach(model, optimizer)
    whole = optimizer.state[model.fc2.weight]["preconditioners"][1].clone()
    pruner.cut()
    fc1 = next(f for f in pruner.families.families if f.name == "fc1")
    stays = ~pruner.mask[fc1.first : fc1.first + fc1.size]
    assert torch.equal(optimizer.state[model.fc2.weight]["preconditioners"][1], whole[stays][:, stays])
    train(model, optimizer, 2, first=2)


def test_a_wrapper_around_an_optimizer_is_cut_as_a_copy():
    model = net()
    optimizer = SAM(list(model.parameters()), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    x, y = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    pruner = attach(model, optimizer.base, also=[optimizer])
    pruner.cut()
    assert optimizer.state[model.conv2.weight]["old"].shape == model.conv2.weight.shape
    optimizer.step(closure)
