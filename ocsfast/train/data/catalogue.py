"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from ocsfast.core.errors import ConfigError
from ocsfast.train.data.cifar import load_cifar
from ocsfast.train.data.digits import load_digits
from ocsfast.train.data.fashion_mnist import load_fashion_mnist
from ocsfast.train.data.folder import load_folder
from ocsfast.train.data.source import Data, Request

LOADERS: Mapping[str, Callable[[Request], Data]] = MappingProxyType(
    {
        "digits": load_digits,
        "fashion-mnist": load_fashion_mnist,
        "cifar10": lambda request: load_cifar("cifar10", request),
        "cifar100": lambda request: load_cifar("cifar100", request),
    }
)


def check_name(name: str) -> str:
    """`name` itself, if it is one of the data sets' names or "folder:PATH".

    Raises:
        ConfigError: it is neither; the choices are listed.
    """
    prefix, _, path = name.partition(":")
    if name not in LOADERS and not (prefix == "folder" and path):
        raise ConfigError(f"unknown data set {name!r}: choose from {', '.join(LOADERS)}, folder:PATH")
    return name


def load(name: str, request: Request) -> Data:
    """Load the data set `name`.

    Raises:
        ConfigError: the name is unknown, or files are missing; it says which and where they go.
    """
    if check_name(name) in LOADERS:
        return LOADERS[name](request)
    return load_folder(Path(name.partition(":")[2]), request)
