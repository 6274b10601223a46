"""Failures planted into what is called, one call at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Everything = tuple[list[Any], list[Any]]  # copies of values, and the objects that hold them


class PlantedError(RuntimeError):
    """What a planted failure raises."""


class Planted:
    """Counts the calls of some functions, and lets one of them fail.

    Args:
        places: (module or class, name) of each function.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> None:
        self.names: list[str] = []  # of what was called, in order
        self.at: int | None = None  # which call is to fail, from 0
        for owner, name in places:
            patch.setattr(owner, name, self._counted(getattr(owner, name), name))

    def _counted(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(real)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 == self.at:
                raise PlantedError(f"planted in {name}")
            return real(*args, **kwargs)

        return counted

    def each(self, call: Callable[[], object]) -> Iterator[None]:
        """Let each call fail in turn, the first, the second, and so on; yields after each failure.

        It ends once none is left to fail, so that `call` has gone through; `at` tells how many did.
        """
        for at in itertools.count():
            self.plant(at)
            try:
                call()
            except PlantedError:
                yield
            else:
                return

    def plant(self, at: int | None) -> None:
        """Count anew, and fail at that call."""
        self.names, self.at = [], at


def require_same(before: Everything, after: Everything) -> None:
    """Nothing has changed: equal values, in the same objects."""
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for a, b in zip(before[1], after[1], strict=True):
        assert a is b
