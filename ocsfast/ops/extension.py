"""The compiled extension, found at import and missed at the first use.

Options, families, plans and the plain-torch reference work without it; an op that is called without it
says what to do. The ops themselves are registered with torch as the extension is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ocsfast.ops._C import BuildInfo

try:
    from ocsfast.ops import _C

    MISSING: ImportError | None = None
except ImportError as error:
    MISSING = error


def build_info() -> BuildInfo:
    """What was built: version, CUDA (whether, which, for which GPUs), compiler, torch's ABI.

    And the instruction set that the CPU's kernels use on this machine: "avx512", "avx2" or "baseline".

    Examples:
        >>> build_info()["instruction_set"] in ("avx512", "avx2", "baseline")
        True

    Raises:
        ImportError: the extension is missing, or was built for another torch or Python.
    """
    require_extension()
    return _C.build_info()


def require_extension() -> None:
    """See that there are kernels.

    Raises:
        ImportError: with the reason, and what to do.
    """
    if MISSING is not None:
        raise ImportError(
            f"The compiled part of ocsfast is missing or does not fit torch {torch.__version__} "
            f"({MISSING}): run `pip install .` in ocsfast's source folder with this torch installed."
        ) from MISSING


def op(name: str) -> Any:
    """One of the compiled ops, as the overload itself: looking that up costs as much as a call."""
    if MISSING is not None:
        return _missing
    return getattr(torch.ops.ocsfast, name).default


def _missing(*arguments: object) -> None:
    require_extension()


def release(ticket: int) -> None:
    """Forget the weights that `bind` returned this number for."""
    _C.release(ticket)
