"""CUDA graphs: whether one is being captured, and what its replays still need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_KEPT: dict[int, Tensor] = {}  # by their ids, which nothing else gets while they live


def is_capturing(device: torch.device) -> bool:
    """Whether what is called now on `device` is recorded instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(tensors: Iterable[Tensor]) -> None:
    """Never free what a captured graph reads and writes: nobody tells when it is replayed last."""
    _KEPT.update((id(tensor), tensor) for tensor in tensors)
