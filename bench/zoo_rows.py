"""Rows of the table of people's own packages: where a class lies, its options and its inputs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Input = tuple[int, ...] | Callable[[], Any]  # a shape without the samples, or what makes an input
SAMPLES = 2


@dataclass(frozen=True)
class Row:
    """A model of somebody's package."""

    where: str  # "package.module:class or function"
    inputs: tuple[Input, ...]
    options: dict[str, Any]  # what `part` and `beside` give is made when the model is

    def make(self) -> Call:
        args = tuple(x() if callable(x) else torch.randn(SAMPLES, *x) for x in self.inputs)
        return found(self.where)(**_made(self.options)), args, {}

    def absent(self) -> str:
        """The name of its package, where that is not installed; else nothing."""
        package = self.where.partition(":")[0].partition(".")[0]
        return package if importlib.util.find_spec(package) is None else ""


def row(where: str, *inputs: Input, **options: Any) -> Row:
    return Row(where, inputs, options)


def ids(limit: int, *shape: int) -> Callable[[], Tensor]:
    """Integers below a limit: tokens, categories, or time steps."""
    return lambda: torch.randint(0, limit, (SAMPLES, *shape))


def found(where: str) -> Any:
    """ "package.module:name" -> what has that name."""
    module, _, name = where.partition(":")
    value = importlib.import_module(module)
    for attribute in name.split("."):
        value = getattr(value, attribute)
    return value


def part(where: str, *args: Any, **options: Any) -> partial[Any]:
    """Another object of a package, such as a config."""
    return partial(lambda: found(where)(*_made(dict(enumerate(args))).values(), **_made(options)))


def beside(module: str, name: str) -> partial[str]:
    """The path of a file that lies where a module of a package does."""
    return partial(lambda: str(Path(found(module + ":__file__")).parent / name))


def _made(options: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value() if isinstance(value, partial) else value for key, value in options.items()}
