"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
import torch

from ocsfast.train.data.memory import Augmentation, Images, in_memory, stratified, subset
from ocsfast.train.data.source import Data, Request
from ocsfast.train.optional import require

TEST_SHARE = 0.25


def load_digits(request: Request) -> Data:
    """scikit-learn's handwritten digits: 1797 grey images of 8x8, a quarter of them for the test."""
    digits = require("sklearn.datasets", "--data digits").load_digits()
    pixels = torch.from_numpy((digits.images * 15).astype(np.uint8)).unsqueeze(1)  # 0..16 -> 0..240
    images = Images(pixels, torch.from_numpy(digits.target).long())
    chosen = torch.zeros(len(images.labels), dtype=torch.bool)
    chosen[stratified(images.labels, round(TEST_SHARE * len(chosen)), request.seed)] = True
    return in_memory(
        "digits",
        subset(images[~chosen], request),
        images[chosen],
        [str(name) for name in digits.target_names],
        Augmentation(),  # a shifted 8x8 digit loses strokes, a mirrored one its meaning
        request.device,
    )
