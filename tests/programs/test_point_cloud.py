"""Point clouds: a network over sets of points, and one over the edges to each point's neighbours."""

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F


class PointNet(nn.Module):
    """[B, 3, N] -> classes: a layer for each point, the maximum over all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(i, o, 1) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(o) for o in (16, 32, 64))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.head(x.max(dim=2)[0])


class EdgeConv(nn.Module):
    """Features of a point and of the way to each of its k nearest neighbours, the largest kept."""

    def __init__(self, inputs, outputs, k):
        super().__init__()
        self.k, self.conv = k, nn.Sequential(nn.Conv2d(2 * inputs, outputs, 1), nn.LeakyReLU(0.2))

    def forward(self, x):
        batch, width, points = x.shape
        near = torch.cdist(x.transpose(1, 2), x.transpose(1, 2)).topk(self.k, largest=False).indices
        index = near.reshape(batch, 1, -1).expand(-1, width, -1)
        neighbours = x.gather(2, index).reshape(batch, width, points, self.k)
        centre = x.unsqueeze(-1).expand_as(neighbours)
        return self.conv(torch.cat((neighbours - centre, centre), 1)).amax(-1)


class Dgcnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = EdgeConv(3, 16, 4), EdgeConv(16, 32, 4)
        self.head = nn.Linear(48, 4)

    def forward(self, x):
        a = self.a(x)
        return self.head(torch.cat((a, self.b(a)), 1).mean(2))


def batch(step):
    return (torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(step)),)


def loss_of(model, inputs):
    return F.cross_entropy(model(*inputs), torch.arange(4))


def test_a_network_over_sets_of_points():
    assert finished(PointNet, batch, loss_of).head[0].in_features < 64


def test_a_network_over_edges():
    model = finished(Dgcnn, batch, loss_of, ratio=0.4)
    assert model.head.in_features < 48
