"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import torch

from ocsfast.core.errors import ConfigError
from ocsfast.train.data.memory import Augmentation, Images, in_memory, subset
from ocsfast.train.data.source import Data, Request
from ocsfast.train.optional import require


def load_cifar(name: str, request: Request) -> Data:
    """CIFAR-10 or CIFAR-100, from where torchvision puts it.

    Raises:
        ConfigError: the data set is missing; it says where it goes.
    """
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
        subset(train, request),
        test,
        splits[0].classes,
        Augmentation(pad=4, flip=True),
        request.device,
    )
