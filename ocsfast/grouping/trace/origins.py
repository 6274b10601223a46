"""Sizes that come from a module's integer attributes, such as `self.num_heads` in a `view`.

A cut has to set such an attribute to the width that is left. While the model is traced, every integer
attribute is an integer that remembers its module and name, and the call that receives it notes both on
its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ocsfast.grouping.trace.shapes import SIZES, remembered, sizes_in

ORIGINS = "ocsfast_origins"  # key of a node's metadata: place -> (module, name, value)


class Origin(int):
    """A module's integer attribute while the model is traced. Arithmetic on it gives a plain integer."""

    module: str
    name: str  # "num_heads"; "splits[1]" for an entry of a sequence
    read: set[tuple[str, str]]  # (module, name) of every attribute that was used

    @classmethod
    def of(cls, value: int, module: str, name: str, read: set[tuple[str, str]]) -> Origin:
        known = cls(value)
        known.module, known.name, known.read = module, name, read
        return known

    def use(self) -> None:
        """Note that the model's code used the attribute."""
        self.read.add((self.module, self.name))


def _noted(operator: str) -> Callable[..., Any]:
    """An operator of integers that also notes which attributes it is used on."""
    plain = getattr(int, operator)

    def noted(self: Origin, *others: Any) -> Any:
        for number in (self, *others):
            if isinstance(number, Origin):
                number.use()
        return plain(self, *others)

    return noted


for _operator in (
    *("add", "sub", "mul", "floordiv", "truediv", "mod", "divmod", "pow", "radd", "rsub", "rmul"),
    *("rfloordiv", "rtruediv", "rmod", "rpow", "neg", "bool", "int", "float", "eq", "ne", "lt", "le"),
    *("gt", "ge"),
):
    setattr(Origin, f"__{_operator}__", _noted(f"__{_operator}__"))


class _Origins(TorchFunctionMode):
    """Notes on the nodes of every call which of its integers are attributes or tensors' sizes."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = int(bool(args) and isinstance(args[0], Tensor))
        numbers = _integers([*args[first:], *kwargs.values()])
        origins = {k: (n.module, n.name, int(n)) for k, n in enumerate(numbers) if isinstance(n, Origin)}
        sizes = sizes_in(numbers)
        for number in numbers:
            if isinstance(number, Origin):
                number.use()
        if not origins and not sizes:
            return remembered(func, args, func(*args, **kwargs))
        with torch.fx.traceback.annotate({ORIGINS: origins, SIZES: sizes}):
            return remembered(func, args, func(*args, **kwargs))


def entry_names(name: str, length: int) -> list[str]:
    """Names for the entries of a sequence of integers: `splits[0]`, `splits[1]` ...

    The last entry of `normalized_shape`, which counts the features, has the name of the whole.
    """
    names = [f"{name}[{k}]" for k in range(length)]
    return [*names[:-1], name] if name == "normalized_shape" else names


def _integers(values: Iterable[Any]) -> list[int]:
    """All integers in a call's arguments, in order."""
    found = []
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _integers(value)
        elif isinstance(value, slice):
            found += _integers((value.start, value.stop, value.step))
    return found


def origins_of(node: torch.fx.Node) -> dict[int, tuple[str, str, int]]:
    """Which integers of a call are attributes: their place -> (module, name, value).

    A place counts the integers behind the tensor that the call is of. In `x.view(2, 3, self.heads)`
    place 2 is `self.heads`.
    """
    return dict(node.meta.get("custom", {}).get(ORIGINS, {}))


@contextmanager
def origins(model: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """Replace every integer attribute of the model's modules by an `Origin` of the same value.

    Yields:
        (module, name) of the attributes that were used; it grows while the model runs.
    """
    read: set[tuple[str, str]] = set()
    before: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            known: Any = None
            if type(value) is int:
                known = Origin.of(value, path, name, read)
            elif type(value) in (tuple, list) and all(type(entry) is int for entry in value):
                names = entry_names(name, len(value))
                named = zip(value, names, strict=True)
                known = type(value)(Origin.of(n, path, own, read) for n, own in named)
            if known is not None:
                before.append((module, name, value))
                vars(module)[name] = known
    try:
        with torch.fx.traceback.preserve_node_meta(), _Origins():
            yield read
    finally:
        for module, name, value in before:
            vars(module)[name] = value
