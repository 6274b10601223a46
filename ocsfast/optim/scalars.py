"""Numbers as the ops take them: 0-dim tensors, on the CPU wherever their values are at hand.

A kernel gets what lies on the CPU with its launch: a step whose numbers are Python's asks nothing more
of a device.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ocsfast.optim.param_groups import Scalar

_FLOAT = struct.Struct("f")


def scalar(value: Scalar, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number, without waiting for a device: on the CPU if it is there already, else on `device`."""
    if not isinstance(value, Tensor):
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    there = value.to(value.device if value.device.type == "cpu" else device, dtype)
    return there.reshape(()) if there.dim() else there


def product(a: Scalar, b: Scalar, device: torch.device) -> Tensor:
    """a * b as a float32 number; on a device by one kernel."""
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(a, Tensor):
        return scalar(a * b, device)
    out = torch.empty((), dtype=torch.float32, device=a.device)
    return scalar(torch.mul(a, b, out=out), device)


def factor_of(lam: Scalar, rate: Scalar, device: torch.device) -> Tensor:
    """Eq. 9's factor: 1 - lam * rate, never below 0 and never above 1."""
    if isinstance(lam, Tensor) or isinstance(rate, Tensor):
        return torch.rsub(product(lam, rate, device), 1.0).clamp_(0.0, 1.0)
    (shrinkage,) = _FLOAT.unpack(_FLOAT.pack(min(max(lam * rate, 0.0), 1.0)))
    return scalar(1.0 - shrinkage, device)
