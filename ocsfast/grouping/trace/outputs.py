"""What a forward pass gives: what it returns, and the tensors that it leaves behind elsewhere.

*Left behind* is what a pass writes to an attribute, a list, or the store of a hook. A loss may read it
like an output, as distillation reads the features that a hook keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.grouping.trace.paths import key_paths
from ocsfast.grouping.trace.snapshot import Snapshot


@contextmanager
def all_outputs(model: nn.Module, snapshot: Snapshot) -> Iterator[None]:
    """Let the model return the pair (its output, {place: tensor} that its pass left behind).

    Dataclasses among the outputs are registered with torch, which then takes them apart. Where the
    model's class overrides `__call__`, hooks do not see the output, and it is returned alone.
    """
    if not returns_both(model):
        yield
        return
    depth = 0  # `forward=` may call the model again; the outermost call alone returns the pair

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def both(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal depth
        depth -= 1
        if depth:
            return None
        _register(output)
        traced = {name: t for name, t in snapshot.left_behind().items() if type(t) is not Tensor}
        return output, traced

    handles = model.register_forward_pre_hook(enter), model.register_forward_hook(both)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(output: Any) -> None:
    """Teach torch to take apart every dataclass in an output."""
    for leaf in pytree.tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            _register(leaf)


def returns_both(model: nn.Module) -> bool:
    """Whether `all_outputs` returns the pair: a class with a `__call__` of its own hides its output."""
    return type(model).__call__ is nn.Module.__call__


def names_of(numbered: Any) -> tuple[str, ...]:
    """The name of each output, from the model's output with a number in the place of each tensor.

    >>> names_of({"logits": 0, "features": [1, 2]})
    ('logits', 'features.0', 'features.1')
    """
    return tuple(".".join(map(_step, path)) or "0" for path, _ in key_paths(numbered))


def _step(entry: Any) -> str:
    """One step on the way to an output: the key, the number or the name that leads there."""
    return str(next(getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)))
