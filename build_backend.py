"""The build backend: setuptools, with torch as a build requirement only where there is none.

Build isolation hides the torch that the extension will run beside. Downloading a second one to compile
against would take minutes and gigabytes, so a torch in the interpreter's own site-packages is used in
place; only its headers and libraries are read, it is never imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import site
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks of PEP 517 and 660 as they are)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# The oldest torch whose stable ABI has all that csrc/ uses; pyproject.toml asks for the same.
TORCH_TARGET = (2, 10)
TORCH_REQUIREMENT = f"torch>={TORCH_TARGET[0]}.{TORCH_TARGET[1]}"


def find_torch() -> Path | None:
    """The folder of the torch to build against, or None: an importable one, or the interpreter's own."""
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        own.append(site.getusersitepackages())
    for spec in (
        importlib.util.find_spec("torch"),
        importlib.machinery.PathFinder.find_spec("torch", own),
    ):
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
    return None


def torch_version(folder: Path) -> tuple[int, int]:
    """Major and minor version of the torch in a folder."""
    found = re.search(
        r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(encoding="utf-8")
    )
    if found is None:
        raise RuntimeError(f"{folder / 'version.py'} names no version: reinstall torch")
    return int(found[1]), int(found[2])


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if find_torch() else [*requirements, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
