"""Sizes that come from a module's integer attributes, such as `self.num_heads` in a `view`.

A cut has to set such an attribute to the width that is left. While the model is traced, every integer
attribute is an integer that remembers its module and name, and the call that receives it notes both on
its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ocsfast.cut.sizes import OF_EVERY_MODULE, with_sizes
from ocsfast.grouping.trace.shapes import SIZES, Place, remembered, sizes_in

ORIGINS = "ocsfast_origins"  # key of a node's metadata: place -> (module, name, value)


class Origin(int):
    """A module's integer attribute while the model is traced. Arithmetic on it gives a plain integer."""

    module: str
    name: str  # as `size_attributes` has it: "num_heads", "splits[1]"
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
        numbers: dict[Place, int] = dict(enumerate(_integers([*args[first:], *kwargs.values()])))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            numbers = _subscripts(args[1], args[0].dim())
        origins = {k: (n.module, n.name, int(n)) for k, n in numbers.items() if isinstance(n, Origin)}
        sizes = sizes_in(numbers)
        for number in numbers.values():
            if isinstance(number, Origin):
                number.use()
        if not origins and not sizes:
            return remembered(func, args, func(*args, **kwargs))
        with torch.fx.traceback.annotate({ORIGINS: origins, SIZES: sizes}):
            return remembered(func, args, func(*args, **kwargs))


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


def _subscripts(index: Any, rank: int) -> dict[Place, int]:
    """All integers in the subscript of a tensor of so many dimensions, by where they stand.

    torch makes a node of each slice. Which of its dimensions that cuts is counted as torch does, from
    the left, in the tensor that the entries before it have made.
    """
    entries = index if isinstance(index, tuple) else (index,)
    masks = (e.dim() for e in entries if isinstance(e, Tensor) and e.dtype in (torch.bool, torch.uint8))
    taken = sum(e is not None and e is not Ellipsis for e in entries) + sum(n - 1 for n in masks)
    found: dict[Place, int] = {}
    dim = 0
    for entry in entries:
        if isinstance(entry, slice):
            parts = {"start": entry.start, "stop": entry.stop, "step": entry.step}
            found.update({(dim, part): n for part, n in parts.items() if isinstance(n, int)})
        elif isinstance(entry, int) and not isinstance(entry, bool):
            found[dim, f"at {len(found)}"] = entry  # such an entry leaves no dimension behind
            continue
        dim += rank - taken if entry is Ellipsis else 1
    return found


def origins_of(node: torch.fx.Node) -> dict[Place, tuple[str, str, int]]:
    """Which integers of a call are attributes: their place -> (module, name, value).

    A place counts the integers behind the tensor that the call is of. In `x.view(2, 3, self.heads)`
    place 2 is `self.heads`. In a subscript it is a dimension and a part of its slice: in
    `x[:, : self.width]` place (1, "stop") is `self.width`.
    """
    return dict(node.meta.get("custom", {}).get(ORIGINS, {}))


def _origin(name: str, value: int, *, path: str, read: set[tuple[str, str]]) -> Origin:
    return Origin.of(value, path, name, read)


@contextmanager
def origins(model: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """Replace every integer attribute of the model's modules by an `Origin` of the same value.

    Yields:
        (module, name) of the attributes that were used; it grows while the model runs.
    """
    read: set[tuple[str, str]] = set()
    before: list[tuple[nn.Module, str, Any]] = []
    contents: dict[int, tuple[Any, Any]] = {}  # lists and dicts, and what they held
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in OF_EVERY_MODULE:
                continue
            plain = contents[id(value)][1] if id(value) in contents else value
            known = with_sizes(name, plain, partial(_origin, path=path, read=read))
            if known is plain:
                continue
            if type(value) in (list, dict) and id(value) not in contents:
                # In place, so that what the pass writes there is seen. A container that several modules
                # share can say only one's name: the others get one of their own.
                contents[id(value)] = value, value.copy()
                _fill(value, known)
            else:
                before.append((module, name, value))
                vars(module)[name] = known
    try:
        with torch.fx.traceback.preserve_node_meta(), _Origins():
            yield read
    finally:
        for module, name, value in before:
            vars(module)[name] = value
        for container, content in contents.values():
            _fill(container, content)


def _fill(container: Any, content: Any) -> None:
    """Let a list or dict hold this instead of what it holds."""
    container.clear()
    (container.update if type(container) is dict else container.extend)(content)
