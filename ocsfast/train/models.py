"""The architectures that the training program can build.

The CIFAR variants of ResNet and VGG are written here, with the sizes of the published tables (ResNet56:
0.13 GMACs, 0.86 M parameters; VGG16: 0.40 GMACs, 14.73 M parameters). The vision transformers are in
vit.py. The rest comes from torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from ocsfast.core.errors import ConfigError
from ocsfast.train.optional import require
from ocsfast.train.vit import VisionTransformer


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. If the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return out


class SmallResNet(nn.Module):
    """A residual network for small images: a 3x3 stem at full resolution, then one stage per width."""

    def __init__(self, widths: Sequence[int], blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages, inputs = [], widths[0]
        for number, width in enumerate(widths):
            strides = [1 if number == 0 else 2] + [1] * (blocks - 1)
            sources = [inputs] + [width] * (blocks - 1)
            stages.append(nn.Sequential(*map(Block, sources, [width] * blocks, strides)))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


class SmallVGG(nn.Module):
    """VGG with batch norm for 32x32 images.

    There is no pooling between stages 4 and 5: with it VGG16 would have 0.31 GMACs instead of the
    published 0.40. `share` scales all widths.
    """

    def __init__(
        self, convolutions: Sequence[int], classes: int, channels: int, share: float = 1.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        widths = [int(share * width) for width in (64, 128, 256, 512, 512)]
        for stage, (width, count) in enumerate(zip(widths, convolutions, strict=True)):
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            if stage < 3:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def initialise(model: nn.Module) -> None:
    """Draw weights anew, as the constructors do, over what the layers' own `reset_parameters` left.

    He's initialisation, as in the official ResNet code; DeiT's for a `VisionTransformer`.

    Args:
        model: a network of this module, also one whose widths were changed.
    """
    if isinstance(model, VisionTransformer):
        model.initialise()
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# (classes, input channels, height and width of the images) -> model
Builder = Callable[[int, int, int], nn.Module]


def _resnet(widths: Sequence[int], blocks: int) -> Builder:
    return lambda classes, channels, size: SmallResNet(widths, blocks, classes, channels)


def _vgg(*convolutions: int, share: float = 1.0) -> Builder:
    return lambda classes, channels, size: SmallVGG(convolutions, classes, channels, share)


def _vit(width: int, heads: int, depth: int) -> Builder:
    return lambda classes, channels, size: VisionTransformer(
        width, heads, depth, classes, channels, size
    )


def _torchvision(name: str) -> Builder:
    def build(classes: int, channels: int, size: int) -> nn.Module:
        models = require("torchvision.models", f"--arch {name}")
        model: nn.Module = getattr(models, name)(num_classes=classes)
        return model if channels == 3 else _with_input_channels(model, channels)

    return build


def _with_input_channels(model: nn.Module, channels: int) -> nn.Module:
    """Replace a model's first convolution by one for images with another number of channels than 3."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, attribute = name.rpartition(".")
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=(old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=(int(old.padding[0]), int(old.padding[1])),
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(model.get_submodule(parent), attribute, new)
    return model


ARCHITECTURES: Mapping[str, Builder] = MappingProxyType(
    {
        # Wide for 8x8 images, so that most of the time goes into arithmetic, which pruning saves.
        "digits_resnet": _resnet((64, 128, 256), 2),
        "resnet20": _resnet((16, 32, 64), 3),
        "resnet32": _resnet((16, 32, 64), 5),
        "resnet56": _resnet((16, 32, 64), 9),
        "resnet110": _resnet((16, 32, 64), 18),
        "vgg16": _vgg(2, 2, 3, 3, 3),
        "vgg16_quarter": _vgg(2, 2, 3, 3, 3, share=0.25),  # of the width: for a CPU
        "vgg19": _vgg(2, 2, 4, 4, 4),
        "mobilenet_v2": _torchvision("mobilenet_v2"),
        "resnet18": _torchvision("resnet18"),
        "resnet50": _torchvision("resnet50"),
        "vit_tiny": _vit(128, 4, 6),  # trains on the digits in a minute or two on a CPU
        "deit_tiny": _vit(192, 3, 12),
        "deit_small": _vit(384, 6, 12),
    }
)
TRANSFORMERS = ("vit_tiny", "deit_tiny", "deit_small")


def build_model(arch: str, classes: int, channels: int, size: int = 32) -> nn.Module:
    """A freshly initialised network; its weights come from torch's global random generator.

    Args:
        arch: one of `ARCHITECTURES`.
        classes: number of classes.
        channels: of the images.
        size: height and width of the images in pixels. Only transformers depend on it.

    Raises:
        ConfigError: the architecture is unknown, or cannot take images of this size.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](classes, channels, size)
