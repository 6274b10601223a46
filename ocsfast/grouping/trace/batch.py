"""The batch that a model is traced with, made from the user's example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError
from ocsfast.grouping.trace.trees import teach

BATCH = 2  # samples. With one, the batch dimension would look like any other dimension of size 1


@dataclass(frozen=True)
class Batch:
    """Inputs to trace a model with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int  # the size of dim 0
    per: int  # how many samples costs are divided by; 1: they are of the whole example


def batches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Batch, ...]:
    """What to trace a model with, in this order: BATCH samples, then the inputs as they are.

    The second is for models that flatten over dim 0, or that take no batch: an image without one, the
    points of a cloud, the nodes of a graph. There is one alone where both are the same.

    Raises:
        GroupingError: dim 0 has size 0.
    """
    given = Batch(*with_batch(args, kwargs, None), per=1)
    some, named, rows = with_batch(args, kwargs)
    first = Batch(some, named, rows, per=rows)
    return (first,) if rows == given.rows else (first, given)


def with_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], samples: int | None = BATCH
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Cut the inputs to `samples` samples, or repeat the first sample until there are as many.

    This is done only where dim 0 of every tensor has the same size. Otherwise, and where `samples` is
    None, the sizes stay, and dim 0 of the first tensor is taken for the number of samples. A tensor that
    is passed twice becomes two, so that each is an input of its own.

    Returns:
        The arguments, the keyword arguments, and how many samples they hold.

    Raises:
        GroupingError: dim 0 has size 0, a tensor is nested, or an object in the inputs holds itself.
    """
    teach((args, kwargs))
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_nested for x in leaves):
        raise GroupingError(
            "example_inputs= holds a nested tensor, whose samples differ in size: pass padded tensors, "
            "and in forward= what to run on them (a function of model and inputs)"
        )
    leading = [x.size(0) for x in leaves if x.dim() > 0]
    size = leading[0] if leading else 1
    if size == 0:
        raise GroupingError("the example inputs hold no sample: pass a batch of one at least")
    even = len(set(leading)) == 1 and all(x.dim() and x.layout is torch.strided for x in leaves)
    as_given = samples is None or not even

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        if samples is None or as_given:
            return x
        return x[:samples].clone() if size >= samples else x[:1].expand(samples, *x.shape[1:]).clone()

    args, kwargs = pytree.tree_map(resize, (args, kwargs))
    return args, kwargs, size if samples is None or as_given else samples
