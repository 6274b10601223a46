"""Labelled images, in batches.

Everything that fits is held as one tensor on the training device and augmented a batch at a time:
on two CPU cores a loader that works image by image takes longer than a small network does.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ocsfast.core.errors import ConfigError
from ocsfast.train.optional import require

CACHE_LIMIT = 2 << 30  # bytes of pixels; an image folder that needs more is streamed from disk
DIGITS_TEST_SHARE = 0.25
# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# Statistics of ImageNet, for folders too large to measure.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Source(Protocol):
    """One split of a data set."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [batch, channels, height, width] float32 and labels [batch] int64.

        With a (CPU) generator: shuffled, augmented, and without the last, incomplete batch, whose
        statistics batch norm could not use. Without one: every image once, in order.
        """


@dataclass(frozen=True, eq=False)
class Data:
    """A data set that is ready to train on."""

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True, eq=False)
class Images:
    """Images held as one tensor."""

    pixels: Tensor  # [images, channels, height, width] uint8
    labels: Tensor  # [images] int64

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image; `pad=4, flip=True` is the usual one for CIFAR."""

    pad: int = 0  # zero pixels around the image before a crop of its own size
    flip: bool = False  # left and right swapped, every other time


@dataclass(frozen=True, eq=False)
class MemorySource:
    """Images that live on the training device."""

    images: Images
    mean: Tensor  # [channels, 1, 1], of pixels in 0..1
    std: Tensor
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


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files that are decoded anew for every batch, by worker processes."""

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
    def __init__(self, files: Sequence[str], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.files, self.labels, self.transform = files, labels, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_image(self.files[index])), int(self.labels[index])


def train_size(images: int, batch_size: int) -> int:
    """Number of images one training epoch uses: whole batches, at least one."""
    return max(images // batch_size, 1) * batch_size


def iterations(source: Source, batch_size: int) -> int:
    """Number of batches in one training epoch."""
    return train_size(len(source), batch_size) // batch_size


def augment(pixels: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and flip each image of a batch on its own: [batch, channels, height, width]."""
    batch, _, height, width = pixels.shape
    if augmentation.pad:
        pad = augmentation.pad
        offsets = torch.randint(2 * pad + 1, (2, batch), generator=generator).to(pixels.device)
        padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
        # All crops as a view without copies, from which each image takes one.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        pixels = windows[torch.arange(batch, device=pixels.device), :, offsets[0], offsets[1]]
    if augmentation.flip:
        flipped = torch.randint(2, (batch, 1, 1, 1), generator=generator).bool().to(pixels.device)
        pixels = torch.where(flipped, pixels.flip(-1), pixels)
    return pixels


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` items drawn so that every class keeps its share: [count] int64, ascending."""
    if not 0 < count <= len(labels):
        raise ConfigError(f"cannot draw {count} of {len(labels)} images: give 1 to {len(labels)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Position of each item in its shuffled class, as a share of the class: the smallest `count` of
    # these are the same share of every class, to one item.
    shares = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        shares[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return torch.argsort(shares, stable=True)[:count].sort().values


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


@dataclass(frozen=True)
class Request:
    """Which data are wanted, and how."""

    root: Path = Path("data")
    subset: int | None = None  # number of training images, or all
    seed: int = 0
    download: bool = False
    image_size: int = 32  # of image folders
    resized_crop: bool = False  # of image folders
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    workers: int = 2


def _subset(images: Images, request: Request) -> Images:
    if request.subset is None:
        return images
    return images[stratified(images.labels, request.subset, request.seed)]


def load_digits(request: Request) -> Data:
    """scikit-learn's handwritten digits: 1797 grey images of 8x8, a quarter of them for the test."""
    digits = require("sklearn.datasets", "--data digits").load_digits()
    pixels = torch.from_numpy((digits.images * 15).astype(np.uint8)).unsqueeze(1)  # 0..16 -> 0..240
    images = Images(pixels, torch.from_numpy(digits.target).long())
    chosen = torch.zeros(len(images.labels), dtype=torch.bool)
    chosen[stratified(images.labels, round(DIGITS_TEST_SHARE * len(chosen)), request.seed)] = True
    return in_memory(
        "digits",
        _subset(images[~chosen], request),
        images[chosen],
        [str(name) for name in digits.target_names],
        Augmentation(),  # a shifted 8x8 digit loses strokes, a mirrored one its meaning
        request.device,
    )


FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion_mnist(request: Request) -> Data:
    """Fashion-MNIST from its four IDX files, in torchvision's layout or Debian's."""
    if request.download:
        require("torchvision.datasets", "--download").FashionMNIST(str(request.root), download=True)
    raw = request.root / "FashionMNIST" / "raw"
    folders = (raw, request.root, DEBIAN_FASHION_MNIST)
    names = ("images-idx3-ubyte", "labels-idx1-ubyte")
    splits = []
    for split in ("train", "t10k"):
        pixels, labels = (read_idx(_find(f"{split}-{name}", folders, raw)) for name in names)
        splits.append(Images(pixels.unsqueeze(1), labels.long()))
    return in_memory(
        "fashion-mnist",
        _subset(splits[0], request),
        splits[1],
        FASHION_MNIST_CLASSES,
        Augmentation(pad=2, flip=True),
        request.device,
    )


def _find(name: str, folders: Sequence[Path], wanted: Path) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ConfigError(
        f"fashion-mnist: {name} is not there. Put the four files {{train,t10k}}-images-idx3-ubyte and "
        f"{{train,t10k}}-labels-idx1-ubyte (plain or .gz) into {wanted}, install Debian's package "
        "dataset-fashion-mnist, or add --download."
    )


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, plain or gzipped: uint8 tensor of the shape in its header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int(n) for n in np.frombuffer(content[4:start], ">u4")] if len(content) >= start else []
    if not dimensions or len(shape) != dimensions or len(content) - start != int(np.prod(shape)):
        raise ConfigError(f"{path} is not a complete IDX file of bytes: fetch it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).view(shape)


def load_cifar(name: str, request: Request) -> Data:
    """CIFAR-10 or CIFAR-100 in torchvision's layout."""
    datasets = require("torchvision.datasets", f"--data {name}")
    dataset, folder = {
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    }[name]
    try:
        splits = [
            dataset(str(request.root), train=train, download=request.download) for train in (True, False)
        ]
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{name}: {' '.join(str(error).split())}. Unpack the archive's python version so that "
            f"{request.root / folder} exists, add --download, or give the images as class folders with "
            "--data folder:PATH."
        ) from error
    train, test = (
        Images(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))
        for split in splits
    )
    return in_memory(
        name,
        _subset(train, request),
        test,
        splits[0].classes,
        Augmentation(pad=4, flip=True),
        request.device,
    )


def load_folder(path: Path, request: Request) -> Data:
    """Any images as `path/train/<class>/*` and `path/test/<class>/*` (or `val`)."""
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
    labels = torch.tensor(train.targets)
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
        return Data(
            name,
            FileSource(
                tuple(files),
                labels[chosen],
                size,
                request.resized_crop,
                request.device,
                request.workers,
            ),
            FileSource(
                tuple(test_files),
                torch.tensor(test.targets),
                size,
                request.resized_crop,
                request.device,
                request.workers,
            ),
            tuple(train.classes),
            (3, size, size),
        )
    return in_memory(
        name,
        Images(_decode(files, size), labels[chosen]),
        Images(_decode(test_files, size), torch.tensor(test.targets)),
        train.classes,
        Augmentation(pad=size // 8, flip=True),
        request.device,
    )


def _decode(files: Sequence[str], size: int) -> Tensor:
    """Every file, resized and cropped to a square: [files, 3, size, size] uint8."""
    pixels = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    for row, file in zip(pixels, files, strict=True):
        row.copy_(_fit(read_image(file), size))
    return pixels


def read_image(file: str) -> Any:
    """A PIL image in RGB, whatever the file holds."""
    image = require("PIL.Image", "an image folder")
    try:
        with image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's ways to say "broken"
        raise ConfigError(f"{file} cannot be read as an image: {error}") from error


def _fit(image: Any, size: int, border: float = 0.0) -> Tensor:
    """The central square of an image at `size`: [3, size, size] uint8; `border` is left out."""
    ops = require("PIL.ImageOps", "an image folder")
    bilinear = require("PIL.Image", "an image folder").Resampling.BILINEAR
    fitted = ops.fit(image, (size, size), method=bilinear, bleed=border)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


@dataclass(frozen=True)
class _Square:
    """Resize and crop the centre; for ImageNet 7/8 of it, as in the official example."""

    size: int
    border: float

    def __call__(self, image: Any) -> Tensor:
        return _fit(image, self.size, self.border)


def _file_transform(source: FileSource, training: bool) -> Callable[[Any], Tensor]:
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


LOADERS: Mapping[str, Callable[[Request], Data]] = MappingProxyType(
    {
        "digits": load_digits,
        "fashion-mnist": load_fashion_mnist,
        "cifar10": lambda request: load_cifar("cifar10", request),
        "cifar100": lambda request: load_cifar("cifar100", request),
    }
)


def check_name(name: str) -> str:
    """`name` itself, or a `ConfigError` that lists the choices."""
    prefix, _, path = name.partition(":")
    if name not in LOADERS and not (prefix == "folder" and path):
        raise ConfigError(f"unknown data set {name!r}: choose from {', '.join(LOADERS)}, folder:PATH")
    return name


def load(name: str, request: Request) -> Data:
    """The data set `name`, or a `ConfigError` that says what is missing and where it goes."""
    if check_name(name) in LOADERS:
        return LOADERS[name](request)
    return load_folder(Path(name.partition(":")[2]), request)
