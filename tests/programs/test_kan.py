"""Kolmogorov-Arnold layers: splines over a grid of knots for each input."""

from itertools import pairwise

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F


class KanLinear(nn.Module):
    def __init__(self, inputs, outputs, grid=5, order=3):
        super().__init__()
        self.in_features, self.out_features, self.order = inputs, outputs, order
        step = 2 / grid
        knots = torch.arange(-order, grid + order + 1) * step - 1
        self.register_buffer("grid", knots.expand(inputs, -1).contiguous())
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.spline = nn.Parameter(torch.randn(outputs, inputs, grid + order) * 0.1)
        self.scaler = nn.Parameter(torch.ones(outputs, inputs))

    def bases(self, x):
        """[n, in] -> [n, in, knots], by de Boor's recursion."""
        x, g = x.unsqueeze(-1), self.grid
        b = ((x >= g[:, :-1]) & (x < g[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)])
            right = (g[:, k + 1 :] - x) / (g[:, k + 1 :] - g[:, 1:-k])
            b = left * b[:, :, :-1] + right * b[:, :, 1:]
        return b

    def forward(self, x):
        spline = (self.spline * self.scaler.unsqueeze(-1)).view(self.out_features, -1)
        return F.linear(F.silu(x), self.base) + F.linear(self.bases(x).view(x.size(0), -1), spline)


def make():
    return nn.Sequential(KanLinear(8, 32), KanLinear(32, 24), KanLinear(24, 3))


def batch(step):
    return (torch.rand(6, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1,)


def test_hidden_nodes_go_with_their_knots():
    model = finished(make, batch, lambda model, inputs: model(*inputs).pow(2).mean())
    for before, after in pairwise(model):
        left = before.base.shape[0]
        assert left == before.out_features == after.in_features == after.grid.shape[0]
        assert after.spline.shape[1] == left
    assert model[0].out_features + model[1].out_features < 56
