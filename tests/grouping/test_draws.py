"""Networks that draw numbers, divide by what may go, or are not finite everywhere: none stays dense."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.grouping.engines import by_labels, group
from ocsfast.grouping.proof.draws import DRAWS
from ocsfast.grouping.proof.trials import Trial
from ocsfast.grouping.scope import Scope


class Net(nn.Module):
    """Two hidden layers; `middle` says what happens between them."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.ones(32))
        self.register_buffer("mean", torch.zeros(32))
        self.register_buffer("std", torch.ones(32))
        self.register_buffer("mask", torch.arange(32) % 5 > 0)
        self.middle = middle

    def forward(self, x):
        h = F.relu(self.first(x)) + 0 * (self.scale + self.mean + self.std)
        return self.last(F.relu(self.second(self.middle(self, h))))


DRAWING = {
    "noise": lambda net, h: h + torch.randn_like(h) * net.scale,
    "a distribution": lambda net, h: h + torch.distributions.Normal(h, F.softplus(h)).rsample(),
    "categories": lambda net, h: h * torch.multinomial(torch.full((2, 7), 0.1), 1),
    "noise by size": lambda net, h: h + torch.randn(h.size(0), h.size(1)) * h.exp(),
    "in place": lambda net, h: h * torch.empty_like(h).normal_(1, 0.1),
    "quantization noise": lambda net, h: h + (torch.rand_like(h) - 0.5) * net.scale,
    "dropout at inference": lambda net, h: F.dropout(h, 0.5, training=True),
    "dropout by hand": lambda net, h: h * (torch.rand_like(h) > 0.5),
    "a mask": lambda net, h: h.masked_fill(torch.rand(h.shape) < 0.1, 0),
    "drop path": lambda net, h: h + h.new_empty(h.shape[0], 1).bernoulli_(0.8).div_(0.8) * net.second(h),
    "sampled units": lambda net, h: h * torch.bernoulli(h.sigmoid()),
    "leaky at random": lambda net, h: F.rrelu(h, training=True),
    "divided by noise": lambda net, h: h / torch.empty_like(h).exponential_(),
    "mixed samples": lambda net, h: h + h[torch.randperm(len(h))],
}
DIVIDING = {
    "learned scale": lambda net, h: h / net.scale,
    "reciprocal": lambda net, h: h * net.scale.reciprocal() * net.scale.rsqrt(),
    "a mask in a buffer": lambda net, h: h * ((h > 0) & net.mask),
    "logarithm": lambda net, h: h * torch.log(net.scale),
    "buffers": lambda net, h: (h - net.mean) / net.std,
    "its own statistics": lambda net, h: (h - h.mean(0)) / h.std(0),
    "its own norm": lambda net, h: h / h.norm(dim=-1, keepdim=True) + h / h.norm(dim=0),
    "quantized": lambda net, h: ((h / net.scale).round() - h / net.scale).detach() + h * net.scale,
    "a root of what relu gives": lambda net, h: h.sqrt() + h.pow(-0.5) + torch.log(h),
}
BY_DTYPE = {  # what the code computes in a dtype of its own, or where the model has another
    "a legacy constructor": lambda net, h: h * torch.sqrt(torch.FloatTensor([0.3])),
    "an array": lambda net, h: h * torch.exp(torch.from_numpy(np.float32([0.3]))),
    "a term by dtype": lambda net, h: h / (h.abs() + (1e-2 if h.dtype == torch.float32 else 1.0)),
    "the limits of a dtype": lambda net, h: h + (h * 1e30).clamp(max=torch.finfo(h.dtype).max) * 1e-36,
}
EVERY = {**DRAWING, **DIVIDING, **BY_DTYPE}


@pytest.mark.parametrize("middle", EVERY)
def test_it_is_pruned_exactly(middle):
    torch.manual_seed(0)
    model = Net(EVERY[middle])
    facts = ocsfast.inspect(model, torch.randn(2, 8))
    assert facts.prunable > 0.9, facts


def test_a_distribution_may_check_its_parameters():
    model = Net(lambda net, h: h + torch.distributions.Normal(h, F.softplus(h)).rsample())
    before = torch.distributions.Distribution._validate_args
    assert not group(model, (torch.randn(2, 8),)).notes
    assert torch.distributions.Distribution._validate_args is before


def test_draws_are_no_zeros_and_differ_between_samples():
    """A zero would hide a wrong label on what it is multiplied by."""
    for name in ("rand", "randn"):
        first, others = DRAWS[name]({})
        assert 0 != first != others != 0
    p = torch.tensor([0.2, 0.9])
    assert torch.equal(DRAWS["bernoulli"]({"self": p}), p)
    assert DRAWS["normal"]({"mean": p, "std": 1.0}).tolist() == pytest.approx([0.8, 1.5])


class Masked(nn.Module):
    """Infinite where a class does not count; with `scale` what is infinite depends on a weight."""

    def __init__(self, scale=False):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.scale = scale

    def forward(self, x):
        out = self.last(F.relu(self.first(x)))
        dropped = out > 1e9 if self.scale else torch.tensor([True, False, False, False])
        return out.masked_fill(dropped, float("-inf"))


def test_infinite_outputs_are_compared_where_they_are_finite():
    facts = ocsfast.inspect(Masked(), torch.randn(2, 8))
    assert facts.prunable > 0.9
    families, setting = by_labels(Masked(), (torch.randn(2, 8),), {}, Scope())
    with torch.no_grad():
        trial = Trial(Masked(), families, setting)
        pruned = torch.zeros(families.num_groups, dtype=torch.bool)
        right = [torch.tensor([[1.0, -torch.inf], [2.0, torch.nan]])]
        for wrong in ([[1.0, 0.0], [2.0, torch.nan]], [[1.0, -torch.inf], [torch.nan, 2.0]]):
            said = trial._apart([torch.tensor(wrong)], right, pruned, None)
            assert said == "numbers that are not finite stand in other places"
        assert trial._apart([right[0].clone()], right, pruned, None) is None
        nothing = [torch.full((2, 2), torch.nan)]
        assert "no finite number" in trial._apart(nothing, nothing, pruned, None)


class Lsq(nn.Module):
    """A learned step size for each channel: the weight is divided by it and multiplied again."""

    def __init__(self, i, o):
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1)
        self.step = nn.Parameter(self.conv.weight.detach().abs().mean((1, 2, 3), keepdim=True) / 4)

    def forward(self, x):
        w = self.conv.weight / self.step
        w = w + (w.clamp(-7, 7).round() - w).detach()
        return F.conv2d(x, w * self.step, self.conv.bias, padding=1)


def test_learned_step_sizes_go_with_their_channels():
    torch.manual_seed(0)
    body = nn.Sequential(Lsq(3, 16), nn.ReLU(), Lsq(16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(2, 3, 8, 8)
    report = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x).cut()
    assert report.cost <= 0.5 * report.cost_dense
    assert model[0].step.shape[0] == model[0].conv.weight.shape[0] < 16
    model(x).sum().backward()
    optimizer.step()
