"""One small module a rule: what may go, proved by the cut itself."""

from __future__ import annotations

import pytest
import torch
from helpers.between import convs, free, grouped
from torch import Tensor, nn
from torch.nn import functional as F


def gathered(x: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    return x[:, order]


PASSING = {
    "roll over places": lambda x: x.roll((1, 2), (2, 3)),
    "flip of places": lambda x: x.flip(3),
    "glu": lambda x: F.glu(torch.cat([x, x], 1), 1),
    "normalize": lambda x: F.normalize(x, dim=(2, 3)),
    "softmax over places": lambda x: x.flatten(2).softmax(-1).view_as(x),
    "hardswish": F.hardswish,
    "unfold of places": lambda x: x.unfold(2, 2, 2).mean(-1),
    "pixel unshuffle and shuffle": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "resampling": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "lp pool": lambda x: F.lp_pool2d(x, 2, 2),
    "fourier": lambda x: torch.fft.irfft2(torch.fft.rfft2(x)),
    "cumulative sum of places": lambda x: x.cumsum(2),
    "largest places": lambda x: x.topk(3, dim=3).values,
    "sorted places": lambda x: x.sort(dim=3).values,
    "maximum of two": lambda x: torch.max(x, x * 2),
    "places by number": lambda x: x[:, :, torch.tensor([0, 3, 1])],
    "index_select of places": lambda x: x.index_select(2, torch.tensor([0, 3])),
    "grid_sample": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), [len(x), 1, 8, 8], align_corners=False)
    ),
    "stack and unbind": lambda x: sum(torch.stack([x, x * 2], 1).unbind(1)),
    "einsum with dots": lambda x: torch.einsum("nc...,nc...->nc...", x, x),
    "outer sum": lambda x: x + torch.einsum("nchw->nc", x)[:, :, None, None],
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) * x,
    "triangle": torch.triu,
    "masked": lambda x: x.masked_fill(torch.ones(8, 8, dtype=torch.bool).tril(), 0.0),
    "softmax over channels": lambda x: x.softmax(1),
    "cumulative sum of channels": lambda x: x.cumsum(1),
    "written into": lambda x: torch.zeros_like(x).copy_(x),
}


@pytest.mark.parametrize("between", PASSING.values(), ids=list(PASSING))
def test_channels_pass(between):
    assert free(convs(between), "first.weight") == 8


STAYING = {
    "roll over channels": lambda x: x.roll(1, 1),
    "channels by number": lambda x: x[:, torch.arange(7, -1, -1)],
    "sorted channels": lambda x: x.sort(dim=1).values,
    "largest channels": lambda x: x.topk(8, dim=1).values,
    "fourier over channels": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=8, dim=1),
    "unfold of channels": lambda x: x.unfold(1, 1, 1).squeeze(-1),
    "gather of channels": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.int64)),
}


@pytest.mark.parametrize("between", STAYING.values(), ids=list(STAYING))
def test_channels_stay(between):
    families = convs(between)
    assert free(families, "first.weight") == 0
    assert any(f.where == "first" for f in families.frozen)


@pytest.mark.parametrize(
    ("between", "into"),
    [
        (lambda x: x.repeat(1, 3, 1, 1), 24),
        (lambda x: x.repeat_interleave(2, 1), 16),
        (lambda x: F.pixel_unshuffle(x, 2), 32),
        (lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32),
        (lambda x: x.tile(2, 1, 1), 16),
    ],
    ids=["repeat", "repeat_interleave", "pixel_unshuffle", "im2col", "tile"],
)
def test_copies_go_with_what_they_copy(between, into):
    families = convs(between, 8, into)
    assert free(families, "first.weight") == 8
    assert free(families, "second.weight", 1) == into


def test_pixel_shuffle_takes_whole_squares():
    families = convs(lambda x: F.pixel_shuffle(x, 2), 16, 4)
    assert [f.size for f in families.families] == [4]
    assert free(families, "first.weight") == 16


def test_col2im_takes_whole_kernels():
    fold = lambda x: F.fold(x.flatten(2)[:, :, :9], (4, 4), 2)  # noqa: E731
    families = convs(fold, 16, 4)
    assert [f.size for f in families.families] == [4]


def test_features_pass_products():
    key = nn.Parameter(torch.randn(8))

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.key = nn.Linear(5, 8), nn.Linear(8, 4), key

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            score = (x @ self.key).softmax(-1)  # a vector
            added = torch.baddbmm(x, score.unsqueeze(-1), x.mean(1, keepdim=True))
            pooled = torch.einsum("...ld,...l->...d", added, score)
            return self.second(pooled)

    families = grouped(Scored(), torch.randn(2, 6, 5))
    assert free(families, "key") == 8
    assert free(families, "second.weight", 1) == 8


def test_a_table_of_biases_lets_its_heads_pass():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.qkv, self.out = nn.Linear(12, 3 * 4 * 6), nn.Linear(24, 3)
            self.table = nn.Parameter(torch.randn(17, 4))
            index = torch.arange(9)[:, None] - torch.arange(9)[None] + 8
            self.register_buffer("index", index, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            n, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, 6).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1)
            scores = q @ k.transpose(-2, -1) * 0.4 + bias
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    families = grouped(Biased(), torch.randn(2, 9, 12))
    assert [f.kind for f in families.families] == ["head"]
    assert free(families, "table", 1) == 4
    assert free(families, "table", 0) == 0
    assert free(families, "out.weight", 1) == 24


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("ways", [False, True], ids=["one way", "both ways"])
def test_hidden_units(cell, ways):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 7)
            self.cell = cell(7, 6, num_layers=2, batch_first=True, bidirectional=ways)
            self.second = nn.Linear(12 if ways else 6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.cell(self.first(x))[0])

    families = grouped(Reader(), torch.randn(2, 6, 5))
    assert free(families, "first.weight") == 7
    assert free(families, "cell.weight_hh_l1", 1) == 6
    assert sorted(f.size for f in families.families) == [6, 7]


@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm(dim):
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),
        torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 3), dim=dim),
        nn.Conv1d(6, 4, 1),
    )
    families = grouped(model, torch.randn(2, 3, 9))
    assert sorted(f.size for f in families.families) == [6, 8]


def test_spectral_norm():
    model = nn.Sequential(
        nn.Linear(3, 8),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)),
        nn.Linear(6, 4),
    )
    families = grouped(model, torch.randn(5, 3))
    assert 8 in [f.size for f in families.families]


def test_standardized_weights():
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(rows, None, None, training=True, eps=1e-6).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias, padding=self.padding)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Standardized(8, 6, 3), nn.Conv2d(6, 4, 1))
    families = grouped(model, torch.randn(2, 3, 8, 8))
    assert sorted(f.size for f in families.families) == [6, 8]


def test_prelu_slopes_follow_their_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 4, 1))
    assert free(grouped(model, torch.randn(2, 3, 4, 4)), "1.weight") == 8


def test_what_is_written_by_number_stays():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            memory = torch.zeros_like(x).index_add(1, torch.tensor([1, 0, 2, 3, 5, 4]), x)
            memory[:, torch.tensor([2])] = x[:, torch.tensor([3])]
            return self.second(memory)

    assert free(grouped(Written(), torch.randn(2, 6, 5)), "first.weight") == 8


def test_a_picked_index_that_only_lends_its_shape_stays_free():
    class Lends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x + torch.arange(x[:, :, -1].shape[1])[None, :, None])

    assert free(grouped(Lends(), torch.randn(2, 6, 5)), "first.weight") == 8


def test_sizes_read_off_another_tensor():
    class Reads(nn.Module):
        """Heads by their number, the width of the input asked of the output."""

        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.first, self.qkv, self.out = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24)
            self.second = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            n, length, width = x.shape
            start = torch.zeros(n, 1, width)
            qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2)
            y = self.out(y.reshape(n, length, width))
            scale = y.mean(-1, keepdim=True).sigmoid().expand(n, length, width)
            return self.second(torch.cat([start, x + y * scale], 1))

    families = grouped(Reads(), torch.randn(2, 9, 5))
    assert [(f.kind, f.size) for f in families.families] == [("head", 4)], families.frozen
    assert free(families, "first.weight") == 24
