"""Failures planted into what is called, one call at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest


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

    def plant(self, at: int | None) -> None:
        """Count anew, and fail at that call."""
        self.names, self.at = [], at
