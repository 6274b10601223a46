"""Fashion-MNIST, and the IDX files that it comes in."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ocsfast.core.errors import ConfigError
from ocsfast.train.data.memory import Augmentation, Images, in_memory, subset
from ocsfast.train.data.source import Data, Request
from ocsfast.train.optional import require

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
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
    """Fashion-MNIST from its four IDX files: where torchvision puts them, or Debian, or in the root.

    Raises:
        ConfigError: a file is missing or damaged; it says where the files go.
    """
    if request.download:
        require("torchvision.datasets", "--download").FashionMNIST(str(request.root), download=True)
    raw = request.root / "FashionMNIST" / "raw"
    folders = (raw, request.root, DEBIAN_FOLDER)
    names = ("images-idx3-ubyte", "labels-idx1-ubyte")
    splits = []
    for split in ("train", "t10k"):
        pixels, labels = (read_idx(_find(f"{split}-{name}", folders, raw)) for name in names)
        splits.append(Images(pixels.unsqueeze(1), labels.long()))
    return in_memory(
        "fashion-mnist",
        subset(splits[0], request),
        splits[1],
        CLASSES,
        Augmentation(pad=2, flip=True),
        request.device,
    )


def _find(name: str, folders: Sequence[Path], wanted: Path) -> Path:
    """The first of the folders' files of that name; the error says to put it into `wanted`."""
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
    """Read an IDX file of bytes, plain or gzipped.

    The file begins with the bytes 0, 0, 8 (its dtype) and the number of dimensions; then each size
    follows as a big-endian 32-bit integer.

    Returns:
        uint8, of the shape in the header.

    Raises:
        ConfigError: the file cannot be read, or is not complete.
    """
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
