"""Loaders: what they yield, and what they say when something is missing."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ocsfast.core.errors import ConfigError
from ocsfast.train.data import fashion_mnist, folder
from ocsfast.train.data.catalogue import load
from ocsfast.train.data.fashion_mnist import read_idx
from ocsfast.train.data.memory import Augmentation, augment, stratified
from ocsfast.train.data.source import Request, iterations

image = pytest.importorskip("PIL.Image")


def test_digits() -> None:
    data = load("digits", Request())
    assert (len(data.train), len(data.test), data.shape) == (1348, 449, (1, 8, 8))
    images, labels = zip(*data.test.batches(100), strict=True)
    assert sum(map(len, labels)) == 449
    assert images[0].dtype == torch.float32
    train = torch.cat([x for x, _ in data.train.batches(2000)])
    assert abs(float(train.mean())) < 1e-3
    assert abs(float(train.std()) - 1) < 1e-3


def test_train_and_test_digits_are_apart_and_depend_on_the_seed() -> None:
    splits = [load("digits", Request(seed=seed)) for seed in (0, 0, 1)]
    labels = [torch.cat([y for _, y in split.test.batches(1000)]) for split in splits]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_training_batches_are_whole_shuffled_and_repeatable() -> None:
    data = load("digits", Request())

    def epoch(seed: int) -> list[torch.Tensor]:
        return [y for _, y in data.train.batches(128, torch.Generator().manual_seed(seed))]

    assert [len(y) for y in epoch(0)] == [128] * 10 == [128] * iterations(data.train, 128)
    assert torch.equal(torch.cat(epoch(0)), torch.cat(epoch(0)))
    assert not torch.equal(torch.cat(epoch(0)), torch.cat(epoch(1)))


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    data = load("digits", Request(subset=50))
    batches = list(data.train.batches(128, torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in batches] == [50]
    assert iterations(data.train, 128) == 1


def test_stratified_keeps_the_shares() -> None:
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    chosen = stratified(labels, 100, seed=0)
    assert len(chosen.unique()) == 100
    assert (labels[chosen].bincount() - torch.tensor([60, 30, 10])).abs().max() <= 1
    assert torch.equal(chosen, stratified(labels, 100, seed=0))
    assert not torch.equal(chosen, stratified(labels, 100, seed=1))


@pytest.mark.parametrize("count", [0, -1, 1349])
def test_bad_subset(count: int) -> None:
    with pytest.raises(ConfigError, match="give 1 to 1348"):
        load("digits", Request(subset=count))


def test_augmentation_takes_a_crop_of_the_padded_image() -> None:
    pixels = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    out = augment(pixels, Augmentation(pad=2, flip=True), generator)
    assert out.shape == pixels.shape
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    shifts = set()
    for before, after in zip(padded, out, strict=True):
        found = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(before[:, y : y + 8, x : x + 8], after.flip(-1) if flip else after)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 20


# Fashion-MNIST


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "."])
def test_fashion_mnist(tmp_path: Path, suffix: str, folder: str) -> None:
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / folder / f"{split}-images-idx3-ubyte{suffix}", pixels)
        write_idx(tmp_path / folder / f"{split}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    data = load("fashion-mnist", Request(root=tmp_path, subset=30))
    assert (len(data.train), len(data.test), data.shape) == (30, 20, (1, 28, 28))


def test_missing_fashion_mnist_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"FashionMNIST/raw.*dataset-fashion-mnist.*--download"):
        load("fashion-mnist", Request(root=tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        b"\0\0\x08\x03\0\0",
        b"\0\0\x0d\x01\0\0\0\x01abcd",
        b"\0\0\x08\x01\0\0\0\x09ab",
        b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xffab",
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_idx(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ConfigError, match="not a complete IDX file"):
        read_idx(path)


def test_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09" + bytes(9))[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_idx(path)


# CIFAR


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
def test_missing_cifar_says_where(tmp_path: Path, name: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path / folder}.*--download.*folder:PATH"):
        load(name, Request(root=tmp_path))


def test_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(root: str, train: bool, download: bool) -> SimpleNamespace:
        count = 60 if train else 20
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=[n % 10 for n in range(count)], classes=["x"] * 10)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    data = load("cifar10", Request())
    assert (len(data.train), len(data.test), data.shape) == (60, 20, (3, 32, 32))


# Folders of images


def make_folder(root: Path, test: str = "test") -> Path:
    """Images of odd sizes and modes, two classes, three images a class and split."""
    random = np.random.default_rng(0)
    for split in ("train", test):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            values = random.integers(0, 256, (50, 31, 4), dtype=np.uint8)
            image.fromarray(values[:, :, :3]).save(folder / "tall.jpg")
            image.fromarray(values[:7]).save(folder / "alpha.png")
            image.fromarray(values[:1, :1, 0]).convert("P").save(folder / "palette.png")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("size", [8, 32])
def test_folder_of_odd_images(tmp_path: Path, test: str, size: int) -> None:
    root = make_folder(tmp_path, test)
    data = load(f"folder:{root}", Request(image_size=size))
    assert (len(data.train), len(data.test), data.shape) == (6, 6, (3, size, size))
    assert data.classes == ("cat", "dog")
    (images, labels), *rest = data.train.batches(6, torch.Generator().manual_seed(0))
    assert not rest
    assert images.shape == (6, 3, size, size)
    assert bool(images.isfinite().all())
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("resized_crop", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resized_crop: bool, workers: int
) -> None:
    monkeypatch.setattr(folder, "CACHE_LIMIT", 0)
    request = Request(image_size=16, resized_crop=resized_crop, workers=workers)
    data = load(f"folder:{make_folder(tmp_path)}", request)
    (images, _), *rest = data.train.batches(4, torch.Generator().manual_seed(0))
    assert not rest
    assert images.shape == (4, 3, 16, 16)
    assert sum(len(labels) for _, labels in data.test.batches(4)) == 6


def test_folder_without_splits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs .*train.* and .*test"):
        load(f"folder:{tmp_path}", Request())


def test_folder_with_an_empty_class(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "train" / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        load(f"folder:{tmp_path}", Request())


def test_folder_whose_splits_differ(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(ConfigError, match=r"same classes.*dog, wolf"):
        load(f"folder:{tmp_path}", Request())


def test_broken_image_is_named(tmp_path: Path) -> None:
    broken = make_folder(tmp_path) / "train" / "cat" / "tall.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"tall\.jpg cannot be read as an image"):
        load(f"folder:{tmp_path}", Request())


# Names and packages


@pytest.mark.parametrize("name", ["cifar11", "", "folder:", "folder"])
def test_unknown_data_set_lists_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match=r"choose from digits, fashion-mnist, .*folder:PATH"):
        load(name, Request())


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("cifar10", "torchvision")])
def test_missing_package(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install ocsfast\[train\]"):
        load(name, Request())
