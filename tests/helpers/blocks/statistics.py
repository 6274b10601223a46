"""Blocks that look at all channels, at all pairs of them, or at what training compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.parts import Case, Classifier, Conv, Sequence, image, tokens


class SpatialGate(nn.Module):
    """CBAM's: the mean and the largest of all channels at each place say how much of it passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * self.conv(both).sigmoid()


def spatial_gate() -> Case:
    return Case(Classifier(nn.Sequential(SpatialGate(), Conv(8, 6)), 8, 6), image())


class ChannelAttention(nn.Module):
    """DANet's: every channel is a mixture of all, by how alike they are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.view(n, c, -1)
        alike = torch.bmm(flat, flat.transpose(1, 2))
        apart = torch.max(alike, -1, keepdim=True)[0].expand_as(alike) - alike
        mixed = torch.bmm(apart.softmax(-1), flat).view(n, c, h, w)
        return self.scale * mixed + x


def channel_attention() -> Case:
    return Case(Classifier(nn.Sequential(ChannelAttention(), Conv(8, 6)), 8, 6), image())


class Clusters(nn.Module):
    """NetVLAD's: features are shared out among clusters, and each cluster sums what is left of them."""

    def __init__(self, dim: int = 16, clusters: int = 6) -> None:
        super().__init__()
        self.assign = nn.Linear(dim, clusters)
        self.centres = nn.Parameter(torch.randn(clusters, dim))

    def forward(self, x: Tensor) -> Tensor:
        share = self.assign(x).softmax(-1)  # [n, length, clusters]
        rest = torch.einsum("nlk,nld->nkd", share, x) - share.sum(1)[..., None] * self.centres
        return F.normalize(rest, dim=-1).amax(1, keepdim=True) + x


def clusters() -> Case:
    return Case(Sequence(Clusters()), tokens(7))


class Distances(nn.Module):
    """How far each token is from every prototype, and how two branches agree."""

    def __init__(self, dim: int = 16, number: int = 9) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(number, dim))
        self.back = nn.Linear(number, dim)
        self.left, self.right = nn.Linear(dim, 10), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        far = torch.cdist(x, self.prototypes.expand(x.shape[0], -1, -1))
        left, right = self.left(x), self.right(x)
        agree = F.mse_loss(left, right) + F.cosine_similarity(left, right, dim=-1)[..., None]
        return self.back(torch.special.expit(far)) * agree


def distances() -> Case:
    return Case(Sequence(Distances()), tokens(7))


class Pooled(nn.Module):
    """SegNet's: maxima are put back where they came from."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        small, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(small * self.inner(small).sigmoid(), places, (2, 2))


def unpooled() -> Case:
    return Case(Classifier(nn.Sequential(Pooled(8), Conv(8, 6)), 8, 6), image())


def bilinear() -> Case:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(7, 8), nn.Linear(7, 6)
            self.pair, self.head = nn.Bilinear(8, 6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.mish(self.pair(self.left(x).abs_(), self.right(x)), inplace=True))

    return Case(Pair(), tokens(7))
