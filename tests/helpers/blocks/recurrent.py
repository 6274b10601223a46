"""Recurrent layers, single cells, and packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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


class Cells(nn.Module):
    """One step after the other, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 10)
        self.gru, self.lstm = nn.GRUCell(10, 12), nn.LSTMCell(12, 8)
        self.plain, self.head = nn.RNNCell(8, 6, nonlinearity="relu"), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.gru.hidden_size)
        state: tuple[Tensor, Tensor] | None = None
        last: Tensor | None = None
        out = []
        for t in range(x.shape[1]):
            h = self.gru(F.relu(self.embed(x[:, t])), h)
            state = self.lstm(h, state)
            last = self.plain(state[0], last)
            out.append(self.head(last))
        return torch.stack(out, 1)


def cells() -> Case:
    return Case(Cells(), tokens(7, 3))


class Stepwise(nn.Module):
    """A cell that reads one token after the other, [batch, length, dim] -> the same shape."""

    def __init__(self, dim: int, hidden: int = 10) -> None:
        super().__init__()
        self.cell, self.back = nn.GRUCell(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        state, out = x.new_zeros(len(x), self.cell.hidden_size), []
        for token in x.unbind(1)[:3]:
            state = self.cell(token, state)
            out.append(self.back(state))
        return torch.stack(out, 1).mean(1, keepdim=True) + x


class Packed(nn.Module):
    """Sequences whose lengths are an input."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 10)
        self.rnn = kind(10, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        x, _ = self.rnn(x)
        y, _ = pad_packed_sequence(x, batch_first=True, total_length=ids.shape[1])
        return self.head(y)


def packed_lstm() -> Case:
    return Case(Packed(nn.LSTM), (torch.randint(20, (2, 6)), torch.tensor([6, 6])))


def packed_gru() -> Case:
    return Case(Packed(nn.GRU), (torch.randint(20, (2, 6)), torch.tensor([6, 6])))
