"""Images that are held as one tensor on the training device, and augmented a batch at a time.

On two CPU cores a loader that works image by image takes longer than a small network does, so everything
that fits is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocsfast.core.errors import ConfigError
from ocsfast.train.data.source import Data, Request, train_size


@dataclass(frozen=True, eq=False)
class Images:
    """Images held as one tensor."""

    pixels: Tensor  # [images, channels, height, width] uint8
    labels: Tensor  # [images] int64

    def __getitem__(self, index: Tensor) -> Images:
        """Those of a mask, [images] bool, or at some positions, [n] int64."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image; `pad=4, flip=True` is the usual choice for CIFAR."""

    pad: int = 0  # zero pixels around the image before a crop of its own size
    flip: bool = False  # left and right swapped, with probability 1/2


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A `Source` of images that lie on the training device."""

    images: Images
    mean: Tensor  # [channels, 1, 1], of pixels in 0..1
    std: Tensor  # [channels, 1, 1]
    augmentation: Augmentation = Augmentation()

    def __len__(self) -> int:
        return len(self.images.labels)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.labels.device
        count = len(self)
        if generator is None:
            for start in range(0, count, batch_size):
                stop = min(start + batch_size, count)
                yield self._normalised(self.images[torch.arange(start, stop, device=device)])
            return
        order = torch.randperm(count, generator=generator).to(device)
        for index in torch.split(order[: train_size(count, batch_size)], batch_size):
            batch = self.images[index]
            pixels = augment(batch.pixels, self.augmentation, generator)
            yield self._normalised(Images(pixels, batch.labels))

    def _normalised(self, batch: Images) -> tuple[Tensor, Tensor]:
        return (batch.pixels.float() / 255 - self.mean) / self.std, batch.labels


def augment(pixels: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and flip each image of a batch independently: [batch, channels, height, width]."""
    batch, _, height, width = pixels.shape
    if augmentation.pad:
        pad = augmentation.pad
        offsets = torch.randint(2 * pad + 1, (2, batch), generator=generator).to(pixels.device)
        padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
        # A view of all crops, without copies; each image takes one.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        pixels = windows[torch.arange(batch, device=pixels.device), :, offsets[0], offsets[1]]
    if augmentation.flip:
        flipped = torch.randint(2, (batch, 1, 1, 1), generator=generator).bool().to(pixels.device)
        pixels = torch.where(flipped, pixels.flip(-1), pixels)
    return pixels


def in_memory(
    name: str,
    train: Images,
    test: Images,
    classes: Sequence[str],
    augmentation: Augmentation,
    device: torch.device,
) -> Data:
    """A data set from tensors, normalised with the statistics of its training images."""
    values = train.pixels.double()
    mean = (values.mean((0, 2, 3)) / 255).float().view(-1, 1, 1)
    std = (values.std((0, 2, 3)) / 255).float().clamp(min=1e-3).view(-1, 1, 1)

    def source(images: Images, augmentation: Augmentation) -> MemorySource:
        there = Images(images.pixels.to(device), images.labels.to(device))
        return MemorySource(there, mean.to(device), std.to(device), augmentation)

    channels, height, width = train.pixels.shape[1:]
    return Data(
        name,
        source(train, augmentation),
        source(test, Augmentation()),
        tuple(classes),
        (channels, height, width),
    )


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw items at random so that every class keeps its share.

    Args:
        labels: [n] int64.
        count: how many to draw, 1 to n.

    Returns:
        Their indices, [count] int64, ascending.

    Raises:
        ConfigError: `count` is out of range.
    """
    if not 0 < count <= len(labels):
        raise ConfigError(f"cannot draw {count} of {len(labels)} images: give 1 to {len(labels)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Each item's position in its shuffled class, as a share of the class. The `count` smallest of these
    # take the same share of every class, to one item.
    shares = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        shares[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return torch.argsort(shares, stable=True)[:count].sort().values


def subset(images: Images, request: Request) -> Images:
    """The number of training images that was asked for, every class keeping its share."""
    if request.subset is None:
        return images
    return images[stratified(images.labels, request.subset, request.seed)]
