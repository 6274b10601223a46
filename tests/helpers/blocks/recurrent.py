"""Recurrent layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.parts import Case, tokens


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 10)
        self.rnn = kind(10, 12, batch_first=True, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(24, 14), nn.ReLU(), nn.Linear(14, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.rnn(F.relu(self.embed(x)))[0][:, -1])


def lstm() -> Case:
    return Case(Recurrent(nn.LSTM), tokens(7))


def gru() -> Case:
    return Case(Recurrent(nn.GRU), tokens(7))
