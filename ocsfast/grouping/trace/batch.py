"""The batch that a model is traced with, made from the user's example inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError
from ocsfast.grouping.trace.trees import teach

BATCH = 2  # samples. With one, the batch dimension would look like any other dimension of size 1


def with_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], samples: int = BATCH
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Cut the inputs to `samples` samples, or repeat the first sample until there are as many.

    This is done only where dim 0 of every tensor has the same size. Otherwise the inputs are returned
    unchanged, and dim 0 of the first tensor is taken for the number of samples.

    Returns:
        The arguments, the keyword arguments, and how many samples they hold.

    Raises:
        GroupingError: dim 0 has size 0.
    """
    teach((args, kwargs))
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    leading = [x.shape[0] for x in leaves if x.dim() > 0]
    size = leading[0] if leading else 1
    if size == 0:
        raise GroupingError("the example inputs hold no sample: pass a batch of one at least")
    if len(set(leading)) != 1 or any(x.dim() == 0 for x in leaves):
        return args, kwargs, size

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        return x[:samples].clone() if size >= samples else x[:1].expand(samples, *x.shape[1:]).clone()

    args, kwargs = pytree.tree_map(resize, (args, kwargs))
    return args, kwargs, samples
