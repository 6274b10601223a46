"""How the elements of a dense tensor follow each other in memory: contiguous or channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether dim 1 is the fastest-moving one, so that a row's columns repeat every `cols` elements.

    A tensor that is contiguous as well, such as a 1x1 convolution's weight, counts as contiguous.
    """
    if tensor.dim() == 4:
        dense = tensor.is_contiguous(memory_format=torch.channels_last)
    elif tensor.dim() == 5:
        dense = tensor.is_contiguous(memory_format=torch.channels_last_3d)
    else:
        return False
    return dense and not tensor.is_contiguous()


def is_dense(tensor: Tensor) -> bool:
    """Whether a kernel can walk it: contiguous or channels_last."""
    return tensor.is_contiguous() or is_channels_last(tensor)


def in_format_of(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` in the memory format of `model`; the same object where that is contiguous.

    Args:
        tensor: contiguous, with as many dimensions as `model`.
    """
    if not is_channels_last(model):
        return tensor
    form = torch.channels_last if model.dim() == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=form)
