"""The packages only the training program needs."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ocsfast.core.errors import ConfigError


def require(module: str, purpose: str) -> ModuleType:
    """Import `module`, or raise a `ConfigError` that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {module.partition('.')[0]} ({error}): pip install ocsfast[train]"
        ) from error
