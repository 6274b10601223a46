"""Gates over channels and places: CBAM's maxima and means, DANet's attention between channels."""

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F


class Cbam(nn.Module):
    def __init__(self, width, reduction=4):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width, width // reduction),
            nn.ReLU(),
            nn.Linear(width // reduction, width),
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        channel = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * channel.sigmoid()[:, :, None, None]
        places = torch.cat((x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)), 1)
        return x * self.spatial(places).sigmoid()


class ChannelAttention(nn.Module):
    """Every channel as a mixture of all, by their likeness."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        batch, width, height, side = x.size()
        query = x.view(batch, width, -1)
        energy = torch.bmm(query, query.transpose(1, 2))
        energy = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
        mixed = torch.bmm(energy.softmax(-1), query).view(batch, width, height, side)
        return self.scale * mixed + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.gate, self.mix = Cbam(16), ChannelAttention()
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.gate(F.relu(self.stem(x)))
        return self.head(self.mix(F.relu(self.body(x))).mean((2, 3)))


def batch(step):
    return (torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(step)),)


def loss_of(model, inputs):
    return F.cross_entropy(model(*inputs), torch.arange(4))


def test_gated_channels_go():
    model = finished(Net, batch, loss_of, ratio=0.7)
    assert model.stem.out_channels == model.gate.mlp[1].in_features == model.body.in_channels < 16
    assert model.body.out_channels == model.head.in_features < 32
