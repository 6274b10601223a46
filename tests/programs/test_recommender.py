"""A click model over many categories: sparse embeddings, a bag of past items, a tower, factors."""

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F

SIZES = (40, 30, 20)


class ClickModel(nn.Module):
    def __init__(self, width=16, hidden=64):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in SIZES)
        self.history = nn.EmbeddingBag(50, width, mode="mean")
        self.dense = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.tower = nn.Sequential(
            *(nn.Linear((len(SIZES) + 2) * width, hidden), nn.BatchNorm1d(hidden), nn.PReLU()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.2)),
        )
        self.out = nn.Linear(hidden, 1)

    def forward(self, dense, ids, items, offsets):
        parts = [table(ids[:, k]) for k, table in enumerate(self.tables)]
        parts += [self.history(items, offsets), self.dense(dense)]
        stacked = torch.stack(parts, 1)
        # Factorization machine: the square of the sum less the sum of the squares.
        crossed = stacked.sum(1).square() - stacked.square().sum(1)
        return (self.out(self.tower(torch.cat(parts, 1))) + 0.5 * crossed.sum(1, keepdim=True)).squeeze(
            1
        )


def batch(step, samples=6):
    g = torch.Generator().manual_seed(step)
    ids = torch.stack([torch.randint(n, (samples,), generator=g) for n in SIZES], 1)
    items = torch.randint(50, (3 * samples,), generator=g)
    return torch.randn(samples, 5, generator=g), ids, items, torch.arange(0, 3 * samples, 3)


def loss_of(model, inputs):
    return F.binary_cross_entropy_with_logits(model(*inputs), inputs[0].sum(1).gt(0).float())


def test_the_tower_and_the_factors_shrink():
    model = finished(ClickModel, batch, loss_of)
    widths = {table.embedding_dim for table in (*model.tables, model.history)}
    assert len(widths) == 1  # the factors are summed: all tables keep the same ones
    assert model.tower[0].in_features == 5 * widths.pop()
    assert model.history.weight.shape[0] == 50
