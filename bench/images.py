"""Images as tensors on the device that trains on them, and their augmentation there.

    python bench/images.py ARCHIVE.tar.xz CACHE.pt     decodes once what `load` then reads

The archive holds train/CLASS/*.jpg and test/CLASS/*.jpg, all of one size.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def decode(file: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def unpack(archive: Path, cache: Path) -> None:
    """All images of the archive as bytes: {"train": (images, labels), "test": ...}."""
    found: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile():
                split, label, _ = member.name.split("/")
                found[split].append((label, files.extractfile(member).read()))
    labels = sorted({label for label, _ in found["train"]})
    splits = {}
    with multiprocessing.Pool() as pool:
        for split, pairs in found.items():
            images = pool.map(decode, [file for _, file in pairs], chunksize=500)
            of = torch.tensor([labels.index(label) for label, _ in pairs])
            splits[split] = (torch.from_numpy(np.stack(images)), of)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}")
    torch.save(splits, partial)
    partial.replace(cache)


def load(cache: Path | None) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
    """CIFAR-10 where it has been unpacked, else scikit-learn's digits."""
    if cache is not None and cache.exists():
        return "CIFAR-10", torch.load(cache)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * 15).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return "digits", {"train": (images[:1347], labels[:1347]), "test": (images[1347:], labels[1347:])}


@dataclass(frozen=True)
class Split:
    """Images that lie on a device."""

    images: Tensor  # uint8; for training with a border of `pad` zeros
    labels: Tensor
    mean: Tensor
    std: Tensor
    pad: int  # 0: no augmentation

    @classmethod
    def of(
        cls, splits: dict[str, tuple[Tensor, Tensor]], split: str, device: str, augment: bool
    ) -> Split:
        sample = splits["train"][0].float()
        mean, std = (f((0, 2, 3)).view(1, -1, 1, 1).to(device) for f in (sample.mean, sample.std))
        images, labels = (t.to(device) for t in splits[split])
        pad = images.shape[-1] // 8 if augment else 0
        return cls(F.pad(images, [pad] * 4), labels, mean, std, pad)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch: whole batches in random order, shifted and mirrored; or all there is, as it is."""
        if generator is None:
            order = torch.arange(len(self), device=self.labels.device)
        else:
            order = torch.randperm(len(self), device=self.labels.device, generator=generator)
            order = order[: len(self) // size * size]
        for index in order.split(size):
            images = self.images[index]
            if self.pad and generator is not None:
                images = self._shift_and_mirror(images, generator)
            yield self._normal(images), self.labels[index]

    def _shift_and_mirror(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, side = len(images), images.shape[-1] - 2 * self.pad
        device = images.device
        windows = images.unfold(2, side, 1).unfold(3, side, 1)
        down, right = torch.randint(2 * self.pad + 1, (2, n), device=device, generator=generator)
        images = windows[torch.arange(n, device=device), :, down, right]
        mirror = torch.rand(n, 1, 1, 1, device=device, generator=generator) < 0.5
        return torch.where(mirror, images.flip(3), images)

    def _normal(self, images: Tensor) -> Tensor:
        images = (images.float() - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("cache", type=Path)
    args = parser.parse_args()
    begun = time.perf_counter()
    if not args.cache.exists():
        unpack(args.archive, args.cache)
    sizes = {split: len(labels) for split, (_, labels) in torch.load(args.cache).items()}
    print(f"{sizes} images after {time.perf_counter() - begun:.1f} s")
