"""Recurrent cells in a loop: a decoder as people write it, and an agent's memory."""

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F


class Decoder(nn.Module):
    def __init__(self, width=16, hidden=24, memory=20):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.gru, self.lstm = nn.GRUCell(width, hidden), nn.LSTMCell(hidden, memory)
        self.out = nn.Linear(memory, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), self.gru.hidden_size)
        state = tuple(x.new_zeros(len(x), self.lstm.hidden_size) for _ in range(2))
        steps = []
        for t in range(x.size(1)):
            h = self.gru(F.relu(self.embed(x[:, t])), h)
            state = self.lstm(h, state)
            steps.append(self.out(state[0]))
        return torch.stack(steps, 1)


def batch(step):
    return (torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(step)),)


def test_cells_shrink_with_what_counts_their_units():
    model = finished(Decoder, batch, lambda model, inputs: model(*inputs).square().mean())
    assert model.gru.weight_hh.shape == (3 * model.gru.hidden_size, model.gru.hidden_size)
    assert model.lstm.weight_ih.shape == (4 * model.lstm.hidden_size, model.gru.hidden_size)
    assert model.gru.hidden_size + model.lstm.hidden_size < 44
