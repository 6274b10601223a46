"""Packages that only the training program needs, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ocsfast.core.errors import ConfigError


def require(module: str, purpose: str) -> ModuleType:
    """Import a module for some purpose.

    Raises:
        ConfigError: it cannot be imported; the error says for what it is needed and how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {module.partition('.')[0]} ({error}): pip install ocsfast[train]"
        ) from error
