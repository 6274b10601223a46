"""Steps of random networks: branches, splits, maps and scales of feature maps and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.convolutional import channel_shuffle


class Parallel(nn.Module):
    """Branches of the same input, joined."""

    def __init__(self, join: str, *branches: nn.Module) -> None:
        super().__init__()
        self.join = join
        self.branches = nn.ModuleList(branches)

    def extra_repr(self) -> str:
        return self.join

    def forward(self, x: Tensor) -> Tensor:
        return joined(self.join, [branch(x) for branch in self.branches], 1 if x.dim() == 4 else -1)


def joined(join: str, parts: list[Tensor], dim: int) -> Tensor:
    if join == "cat":
        return torch.cat(parts, dim)
    if join == "stack":
        return torch.stack(parts, dim).mean(dim if dim > 0 else -1)
    if join == "stack last":
        return torch.stack(parts, -1).sum(-1)
    out = parts[0]
    for part in parts[1:]:
        if join == "add":
            out = out + part
        elif join == "sub":
            out = out - part
        elif join == "gate":
            out = out * part.sigmoid()
        else:
            out = torch.maximum(out, part)
    return out


class Split(nn.Module):
    """Parts of the channels, each with a step of its own, joined."""

    def __init__(self, how: str, width: int, join: str, *branches: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.join = join
        self.width = width  # of each part
        self.branches = nn.ModuleList(branches)

    def extra_repr(self) -> str:
        return f"{self.how}, {self.join}"

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if x.dim() == 4 else -1
        count = len(self.branches)
        parts: Sequence[Tensor]
        if self.how == "chunk":
            parts = x.chunk(count, dim)
        elif self.how == "split":
            parts = x.split(self.width, dim)
        elif self.how == "sizes":
            parts = x.split([self.width] * count, dim)
        elif self.how == "view":
            parts = x.unflatten(dim, (count, x.shape[dim] // count)).unbind(dim if dim > 0 else -2)
        else:
            parts = [x.narrow(dim, k * self.width, self.width) for k in range(count)]
        return joined(self.join, [f(part) for f, part in zip(self.branches, parts, strict=True)], dim)


class Twice(nn.Module):
    """The same module again and again."""

    def __init__(self, body: nn.Module, residual: bool) -> None:
        super().__init__()
        self.body = body
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.body(x))
        return x + y if self.residual else y


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(x, self.groups)


class Scaled(nn.Module):
    """A parameter for each channel, or for a place and a channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape[-3:]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class ChannelsLast(nn.Module):
    """ConvNeXt's way: norm and linear layers on the last dimension, then back."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OverGroups(nn.Module):
    """Channels as (groups, rest): a reduction over one of them."""

    def __init__(self, groups: int, how: str) -> None:
        super().__init__()
        self.groups = groups
        self.how = how

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.how}"

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w)
        if self.how == "sum":
            return x.sum(1)
        if self.how == "max":
            return x.amax(1)
        if self.how == "softmax":
            return (x * x.softmax(1)).sum(1)
        return x.mean(1)


# Functions of a feature map [n, c, h, w] that look at all channels, or that have no rule of their own.
# What is zero stays zero, since a sum over channels further on may count on that.
EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x * x.softmax(1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "amax": lambda x: x * x.amax(1, keepdim=True).sigmoid(),
    "min": lambda x: x * x.min(1, keepdim=True).values.sigmoid(),
    "logsumexp": lambda x: x * torch.special.logsumexp(x, 1, keepdim=True).sigmoid(),
    "prod": lambda x: x * torch.arctan(x.prod(1, keepdim=True)),
    "cumsum": lambda x: x * torch.arctan(x.cumsum(1)),
    "loss": lambda x: torch.multiply(x, F.smooth_l1_loss(x, x.abs().tanh())),
    "similarity": lambda x: x * F.cosine_similarity(x, x.abs(), dim=1)[:, None],
    "diagonal": lambda x: x * torch.diagonal(_gram(x), dim1=1, dim2=2).tanh()[..., None, None],
    "einsum": lambda x: x * torch.einsum("ncc->n", _gram(x)).tanh().view(-1, 1, 1, 1),
    "distance": lambda x: (
        x * torch.cdist(x.flatten(2).mT, x.flatten(2).mT[:, :1]).view_as(x[:, :1]).tanh()
    ),
}


def _gram(x: Tensor) -> Tensor:
    """The product of every two channels: [n, c, c]."""
    return torch.einsum("nchw,ndhw->ncd", x, x) / x[0, 0].numel()


class Map(nn.Module):
    """A function of the feature map alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        if self.how in EXTREMES:
            return EXTREMES[self.how](x)
        if self.how == "flip":
            return x.flip(1)
        if self.how == "norm":
            return F.normalize(x, dim=1)
        if self.how == "gate":
            return x * torch.sigmoid(x.mean(1, keepdim=True))
        if self.how == "spatial":
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        if self.how == "roll":
            return x.roll(1, 1)
        if self.how == "double":
            return torch.cat((x, -x), 1)
        if self.how == "interleave":
            return x.repeat_interleave(2, 1)
        if self.how == "resize":
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
        if self.how == "pad":
            return F.pad(x, (0, 0, 0, 0, 0, 4))
        return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]


class Tokens(nn.Module):
    """Places become tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class ClassToken(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, length + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.pos


class Pick(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first":
            return x[:, 0]
        if self.how == "flat":
            return x.flatten(1)
        if self.how == "max":
            return x.flatten(2).amax(2) if x.dim() == 4 else x.amax(1)
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
