"""What every data set offers to training, two splits that give batches; and what a loader is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """One split of a data set."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and labels.

        Args:
            generator: on the CPU. With one, the images are shuffled and augmented. An incomplete last
                batch is left out, because the statistics of few images are too noisy for batch norm.
                Without one, every image comes once, in order.

        Yields:
            Normalised images, [batch, channels, height, width] float32, and labels, [batch] int64.
        """


@dataclass(frozen=True, eq=False)
class Data:
    """A data set that is ready to train on."""

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Request:
    """What is asked of a loader: where the images lie, which of them, and where they go."""

    root: Path = Path("data")
    subset: int | None = None  # number of training images; None: all
    seed: int = 0
    download: bool = False
    image_size: int = 32  # of image folders
    resized_crop: bool = False  # of image folders: ImageNet's augmentation instead of a padded crop
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    workers: int = 2  # processes that decode a folder that is streamed


def train_size(images: int, batch_size: int) -> int:
    """Number of images that one training epoch uses: whole batches, at least one."""
    return max(images // batch_size, 1) * batch_size


def iterations(source: Source, batch_size: int) -> int:
    """Number of batches in one training epoch."""
    return train_size(len(source), batch_size) // batch_size
