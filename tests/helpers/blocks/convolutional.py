"""Blocks of convolutions: branches, shuffles, gates, transposed ones, skips."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.parts import Case, Classifier, Conv, image


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1 = Conv(c, c, 3)
        self.cv2 = Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLOv8's: chunk, a chain of bottlenecks, everything concatenated."""

    def __init__(self, c1: int, c2: int, n: int = 2, e: float = 0.5, by_size: bool = False) -> None:
        super().__init__()
        self.c = int(c2 * e)
        self.by_size = by_size
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y = list(x.split((self.c, self.c), 1) if self.by_size else x.chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


def c2f_chunk() -> Case:
    return Case(Classifier(C2f(8, 12), 8, 12), image())


def c2f_split() -> Case:
    return Case(Classifier(C2f(8, 12, by_size=True), 8, 12), image())


class Csp(nn.Module):
    """Two branches side by side, one of them deep."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        c_ = c2 // 2
        self.cv1 = Conv(c1, c_)
        self.cv2 = Conv(c1, c_)
        self.cv3 = Conv(2 * c_, c2)
        self.m = nn.Sequential(Bottleneck(c_), Bottleneck(c_))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


def csp() -> Case:
    return Case(Classifier(Csp(8, 12), 8, 12), image())


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's: half of the channels pass, the other half is worked on, then they mix."""

    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.branch = nn.Sequential(
            Conv(half, half), Conv(half, half, 3, g=half, act=False), Conv(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch(x2)), dim=1), 2)


def shuffle() -> Case:
    body = nn.Sequential(ShuffleUnit(12), ShuffleUnit(12), Conv(12, 10))
    return Case(Classifier(body, 12, 10), image())


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, reduced: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(c, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


def squeeze_excite() -> Case:
    return Case(Classifier(nn.Sequential(SqueezeExcite(8, 4), Conv(8, 8, 3)), 8, 8), image())


class SqueezeExciteLinear(nn.Module):
    """The same with linear layers and views, as in SENet's own code."""

    def __init__(self, c: int, reduced: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, reduced), nn.ReLU(True), nn.Linear(reduced, c), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


def squeeze_excite_linear() -> Case:
    return Case(Classifier(nn.Sequential(SqueezeExciteLinear(8, 4), Conv(8, 8, 3)), 8, 8), image())


def pixel_shuffle() -> Case:
    return Case(
        nn.Sequential(
            Conv(3, 8, 3), Conv(8, 12, 3), nn.PixelShuffle(2), Conv(3, 6, 3), nn.Conv2d(6, 3, 1)
        ),
        image(),
    )


def pixel_unshuffle() -> Case:
    return Case(
        nn.Sequential(Conv(3, 6, 3), nn.PixelUnshuffle(2), Conv(24, 6, 3), nn.Conv2d(6, 3, 1)), image()
    )


def depthwise_multiplier() -> Case:
    return Case(Classifier(nn.Sequential(Conv(8, 16, 3, g=8), Conv(16, 10)), 8, 10), image())


def unequal_groups() -> Case:
    """Input and output of a grouped convolution have different widths."""
    return Case(Classifier(nn.Sequential(Conv(8, 12, 3, g=4), Conv(12, 10)), 8, 10), image())


class Shared(nn.Module):
    """One convolution at two scales, as in a detection head."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(c), nn.BatchNorm2d(c)])
        self.out = nn.Conv2d(c, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x, F.max_pool2d(x, 2)]
        return [
            self.out(F.relu(norm(self.conv(level))))
            for norm, level in zip(self.norms, levels, strict=True)
        ]


def weight_sharing() -> Case:
    return Case(nn.Sequential(Conv(3, 8, 3), Shared(8)), image())


def tied_autoencoder() -> Case:
    """The decoder's matrix is the encoder's, transposed."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(9, 12)
            self.bias = nn.Parameter(torch.zeros(9))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)

    return Case(Tied(), (torch.randn(2, 9),))


def transposed() -> Case:
    body = nn.Sequential(nn.ConvTranspose2d(8, 10, 2, 2), nn.BatchNorm2d(10), nn.ReLU(), Conv(10, 6, 3))
    return Case(Classifier(body, 8, 6), image())


def transposed_groups() -> Case:
    body = nn.Sequential(
        nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.BatchNorm2d(12), nn.ReLU(), Conv(12, 6)
    )
    return Case(Classifier(body, 8, 6), image())


def transposed_depthwise() -> Case:
    body = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8), nn.ReLU(), Conv(8, 6))
    return Case(Classifier(body, 8, 6), image())


class DoubleConv(nn.Sequential):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(nn.Conv2d(c1, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(inplace=True))
        self.extend([nn.Conv2d(c2, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(inplace=True)])


class UNet(nn.Module):
    """Skips that are padded to size and concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = DoubleConv(width, 2 * width)
        self.down2 = DoubleConv(2 * width, 4 * width)
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.conv1 = DoubleConv(4 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.conv2 = DoubleConv(2 * width, width)
        self.outc = nn.Conv2d(width, 2, 1)

    @staticmethod
    def join(x: Tensor, skip: Tensor) -> Tensor:
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(self.join(self.up1(x3), x2))
        return self.outc(self.conv2(self.join(self.up2(x), x1)))


def unet() -> Case:
    return Case(UNet(4), image(side=10))


def group_norm() -> Case:
    body = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 12, 3), nn.GroupNorm(1, 12), nn.ReLU())
    return Case(Classifier(body, 16, 12), image())


def flatten_linear() -> Case:
    features = nn.Sequential(Conv(3, 8, 3), nn.MaxPool2d(2), nn.Flatten())
    return Case(
        nn.Sequential(features, nn.Linear(8 * 16, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4)),
        image(),
    )


class Reorganize(nn.Module):
    """Space to depth by slices (YOLOv5's Focus) inside a network."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = Conv(4 * c, 10)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(parts, 1))


def focus() -> Case:
    return Case(Classifier(Reorganize(6), 6, 10), image())


def prelu() -> Case:
    body = nn.Sequential(nn.Conv2d(8, 10, 3), nn.PReLU(10), nn.Conv2d(10, 6, 1), nn.PReLU())
    return Case(Classifier(body, 8, 6), image())
