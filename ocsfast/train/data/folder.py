"""Image files in folders named after their classes: held in memory if they fit, else streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocsfast.core.errors import ConfigError
from ocsfast.train.data.memory import Augmentation, Images, in_memory, stratified
from ocsfast.train.data.source import Data, Request, train_size
from ocsfast.train.optional import require

CACHE_LIMIT = 2 << 30  # bytes of pixels; a folder that needs more is streamed from disk
# The mean and the standard deviation of ImageNet's pixels, for folders that are too large to measure.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_folder(path: Path, request: Request) -> Data:
    """Images as `path/train/<class>/*` and `path/test/<class>/*` (or `val` for `test`).

    They are held in memory unless that takes more than `CACHE_LIMIT`, or each epoch crops the original
    anew (`resized_crop`).

    Raises:
        ConfigError: a folder is missing or empty, or the splits hold different classes.
    """
    train, test = _opened(path)
    labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
    chosen = (
        torch.arange(len(labels))
        if request.subset is None
        else stratified(labels, request.subset, request.seed)
    )
    files = [train.samples[index][0] for index in chosen.tolist()]
    test_files = [file for file, _ in test.samples]
    size = request.image_size
    name = f"folder:{path}"
    if request.resized_crop or (len(files) + len(test_files)) * 3 * size * size > CACHE_LIMIT:
        how = (size, request.resized_crop, request.device, request.workers)
        return Data(
            name,
            FileSource(tuple(files), labels[chosen], *how),
            FileSource(tuple(test_files), test_labels, *how),
            tuple(train.classes),
            (3, size, size),
        )
    return in_memory(
        name,
        Images(_decode(files, size), labels[chosen]),
        Images(_decode(test_files, size), test_labels),
        train.classes,
        Augmentation(pad=size // 8, flip=True),
        request.device,
    )


def _opened(path: Path) -> tuple[Any, Any]:
    """torchvision's `ImageFolder` of the training and of the test images."""
    datasets = require("torchvision.datasets", "--data folder:PATH")
    test_name = next((name for name in ("test", "val") if (path / name).is_dir()), None)
    if test_name is None or not (path / "train").is_dir():
        raise ConfigError(
            f"folder {path} needs {path / 'train'} and {path / 'test'} (or val), with a folder of "
            "images for each class"
        )
    try:
        train, test = (datasets.ImageFolder(str(path / name)) for name in ("train", test_name))
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"folder {path}: {' '.join(str(error).split())}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"folder {path}: train and {test_name} must hold the same classes; only one of them has "
            f"{', '.join(odd[:5])}"
        )
    return train, test


def _decode(files: Sequence[str], size: int) -> Tensor:
    """Every file, resized and cropped to a square: [files, 3, size, size] uint8."""
    pixels = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    for row, file in zip(pixels, files, strict=True):
        row.copy_(_fit(read_image(file), size))
    return pixels


def read_image(file: str) -> Any:
    """Read a file as a PIL image in RGB, whatever its own colours.

    Raises:
        ConfigError: it is not an image that can be read.
    """
    image = require("PIL.Image", "an image folder")
    try:
        with image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises on a broken file
        raise ConfigError(f"{file} cannot be read as an image: {error}") from error


def _fit(image: Any, size: int, border: float = 0.0) -> Tensor:
    """The central square of an image, resized: [3, size, size] uint8.

    Args:
        border: the share of the image that is left out at each side.
    """
    ops = require("PIL.ImageOps", "an image folder")
    bilinear = require("PIL.Image", "an image folder").Resampling.BILINEAR
    fitted = ops.fit(image, (size, size), method=bilinear, bleed=border)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


@dataclass(frozen=True)
class _Square:
    """A transform to the central square; with border=1/16, to 7/8 of it, as in ImageNet's example."""

    size: int
    border: float

    def __call__(self, image: Any) -> Tensor:
        return _fit(image, self.size, self.border)


def _file_transform(source: FileSource, training: bool) -> Callable[[Any], Tensor]:
    """PIL image -> [3, size, size] uint8; random crops and flips in training, else the centre."""
    if not training:
        return _Square(source.size, 1 / 16 if source.resized_crop else 0.0)
    transforms = require("torchvision.transforms", "an image folder")
    crop = (
        [transforms.RandomResizedCrop(source.size)]
        if source.resized_crop
        else [
            transforms.Resize(source.size),
            transforms.CenterCrop(source.size),
            transforms.RandomCrop(source.size, padding=source.size // 8),
        ]
    )
    composed: Callable[[Any], Tensor] = transforms.Compose(
        [*crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    return composed


@dataclass(frozen=True, eq=False)
class FileSource:
    """A `Source` of image files that worker processes decode anew for every batch."""

    files: tuple[str, ...]
    labels: Tensor  # [files] int64, CPU
    size: int  # height and width
    resized_crop: bool
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        training = generator is not None
        order = (
            torch.randperm(len(self), generator=generator)[: train_size(len(self), batch_size)]
            if training
            else torch.arange(len(self))
        )
        loader = torch.utils.data.DataLoader(
            _Decoder(self.files, self.labels, _file_transform(self, training)),
            batch_size=batch_size,
            sampler=order.tolist(),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=generator,
        )
        mean, std = (
            torch.tensor(value, device=self.device).view(3, 1, 1)
            for value in (IMAGENET_MEAN, IMAGENET_STD)
        )
        for pixels, labels in loader:
            images = pixels.to(self.device, non_blocking=True).float() / 255
            yield (images - mean) / std, labels.to(self.device, non_blocking=True)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Reads and transforms one file at a time; copied into each worker process."""

    def __init__(self, files: Sequence[str], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.files, self.labels, self.transform = files, labels, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_image(self.files[index])), int(self.labels[index])
