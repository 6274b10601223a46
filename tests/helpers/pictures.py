"""A made-up data set for detectors of ultralytics: red and blue rectangles on noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((255, 0, 0), (0, 0, 255))


def write_pictures(folder: Path, count: int = 16, size: int = 64) -> Path:
    """Write as many pictures for training as for validation; the path of the data's YAML file."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        images, labels = folder / "images" / part, folder / "labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            width, height = rng.integers(size // 3, size // 2, 2)
            x, y = rng.integers(0, size - width), rng.integers(0, size - height)
            pixels[y : y + height, x : x + width] = COLOURS[k % 2]
            Image.fromarray(pixels).save(images / f"{k}.png")
            box = (x + width / 2, y + height / 2, width, height)  # its middle and its sides
            (labels / f"{k}.txt").write_text(" ".join(map(str, (k % 2, *(v / size for v in box)))))
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [red, blue]\n")
    return data
