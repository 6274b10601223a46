"""The operators of torchvision's detectors: pooled regions and deformable convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.choices import portion
from torch import Tensor, nn
from torchvision import ops

from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group


class Pools(nn.Module):
    """Every way to pool a region, each with its own layer behind it."""

    def __init__(self, pool: Callable[..., Tensor], channels: int, left: int) -> None:
        super().__init__()
        self.pool = pool
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.head = nn.Linear(left * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        far = torch.linspace(0.5, 1.0, 4, dtype=x.dtype) * x.shape[-1]
        boxes = torch.stack([torch.zeros_like(far), torch.zeros_like(far), far, far], 1)
        features = self.stem(x).relu()
        return self.head(self.pool(features, [boxes] * len(x), 3, 0.5).flatten(1))


@pytest.mark.parametrize(
    ("pool", "channels", "groups"),
    [
        (ops.roi_align, 12, 12),
        (ops.roi_pool, 12, 12),
        (ops.ps_roi_align, 54, 6),
        (ops.ps_roi_pool, 54, 6),
    ],
)
def test_pooling_passes_channels_through(pool, channels, groups):
    torch.manual_seed(0)
    model = Pools(pool, channels, groups)
    x = torch.rand(2, 3, 16, 16)
    families = group(model, (x,))
    assert [(f.name, f.size) for f in families.families] == [("stem", groups)]
    cut_model(model, families, portion(families, 0.5))
    assert model.head.in_features == groups // 2 * 9
    assert model(x).shape == (8, 5)


class Deformed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 18 * options.pop("offset_groups", 1), 3, padding=1)
        self.deform = ops.DeformConv2d(8, 10, 3, padding=1, **options)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.deform(x, self.offset(x)).relu())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, [("stem", 8), ("deform", 10)]),
        ({"bias": False}, [("stem", 8), ("deform", 10)]),
        ({"groups": 2}, []),
        ({"offset_groups": 2}, []),
    ],
)
def test_deformable_convolutions_pass_channels_unless_in_groups(options, found):
    torch.manual_seed(0)
    model = Deformed(**options)
    x = torch.rand(2, 3, 8, 8)
    families = group(model, (x,))
    assert [(f.name, f.size) for f in families.families] == found
    if found:
        cut_model(model, families, portion(families, 0.5))
        assert (model.deform.in_channels, model.deform.out_channels) == (4, 5)
        assert model(x).shape == (2, 4, 8, 8)
