"""Tensors in nested inputs and outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure, in its order."""
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
