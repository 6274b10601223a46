"""What a forward pass gives: what it returns, and the tensors that it leaves behind elsewhere.

*Left behind* is what a pass writes to an attribute, a list, or the store of a hook. A loss may read it
like an output, as distillation reads the features that a hook keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ocsfast.grouping.trace.snapshot import Snapshot
from ocsfast.grouping.trace.trees import leaves_with_paths, shown, teach, without_strangers


@contextmanager
def all_outputs(model: nn.Module, snapshot: Snapshot, *, whole: bool = False) -> Iterator[list[str]]:
    """Let the model return the pair (its output, {place: tensor} that its pass left behind).

    Objects among the outputs are made known to torch, which then takes them apart. What holds no tensor
    and cannot be returned from a graph is left out, or refused. Where the model's class overrides
    `__call__`, hooks do not see the output, and it is returned alone.

    Args:
        model: what runs inside.
        snapshot: of before.
        whole: whether the graph has to return all that the model returns.

    Yields:
        The names of the outputs, once the model has run; empty where hooks do not see them.
    """
    names: list[str] = []
    if not returns_both(model):
        yield names
        return
    depth = 0  # `forward=` may call the model again; the outermost call alone returns the pair

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        return None if depth > 1 else shown((args, kwargs))

    def both(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal depth
        depth -= 1
        if depth:
            return None
        teach(output)
        known = without_strangers(output, whole=whole)
        names[:] = names_of(known)
        traced = {name: t for name, t in snapshot.left_behind().items() if type(t) is not Tensor}
        return known, traced

    handles = (
        model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        model.register_forward_hook(both),
    )
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def returns_both(model: nn.Module) -> bool:
    """Whether `all_outputs` returns the pair: a class with a `__call__` of its own hides its output."""
    return type(model).__call__ is nn.Module.__call__


def names_of(output: Any) -> tuple[str, ...]:
    """The name of each output, from what the model returned, or a copy of it with anything in its place.

    >>> names_of({"logits": 0, "features": [1, 2]})
    ('logits', 'features.0', 'features.1')
    """
    return tuple(".".join(map(_step, path)) or "0" for path, _ in leaves_with_paths(output))


def _step(entry: Any) -> str:
    """One step on the way to an output: the key, the number or the name that leads there."""
    return str(next((getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)), entry))
