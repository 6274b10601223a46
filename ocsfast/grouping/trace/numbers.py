"""Numbers that code takes out of tensors it has made of constants: `torch.arange(1, x.dim()).tolist()`.

A trace has no numbers, so torch cannot follow such code. But these numbers are the same in every pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

LARGEST = 256  # elements; what code loops over is small
MAKE = frozenset({"arange", "tensor", "as_tensor", "zeros", "ones", "full", "eye"})  # from no tensor
# What makes a number of a tensor.
READ = frozenset({"tolist", "item", "__int__", "__index__", "__bool__", "__len__", "equal"})
# What takes integers, for which code may pass the elements of a tensor: `x.permute(*order)`.
TAKE = frozenset({"permute", "view", "reshape", "expand", "repeat", "transpose", "movedim"})
UNKNOWN = ("rand", "empty", "bernoulli", "multinomial", "normal")  # not the same in every pass


class KnownNumbers(TorchFunctionMode):
    """While it is entered, integer tensors that come of constants alone have their numbers.

    Each call on such tensors is also made on real ones. Where the code writes something else to one of
    them, all are forgotten, since others may be views of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the traced tensor, the real one

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        # Most calls ask a tensor for its shape or dtype, and most models make no such tensors.
        if name == "__get__" or (not self._known and name not in MAKE):
            return func(*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(id(x) in self._known for x in tensors)
        if name in TAKE and len(tensors) > 1:
            args = (args[0], *pytree.tree_map_only(Tensor, self._integer, args[1:]))
        elif tensors and known and name in READ:
            return self._real(func, args, kwargs)
        out = func(*args, **kwargs)
        if known and self._follows(name, bool(tensors), out):
            self._remember(out, self._real(func, args, kwargs))
        elif tensors and id(tensors[0]) in self._known and name.endswith("_") and name not in READ:
            self._known.clear()
        return out

    def _follows(self, name: str, of_tensors: bool, out: Any) -> bool:
        """Whether the result of a call on known tensors is known too."""
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        small = all(not x.is_floating_point() and x.numel() <= LARGEST for x in results)
        if not of_tensors:
            return small and bool(results) and name in MAKE
        return small and (bool(results) or name == "__setitem__") and not name.startswith(UNKNOWN)

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call on the real tensors."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: self._known[id(x)][1], (args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _remember(self, out: Any, real: Any) -> None:
        for traced, number in zip(pytree.tree_leaves(out), pytree.tree_leaves(real), strict=True):
            if isinstance(traced, Tensor):
                self._known[id(traced)] = traced, number

    def _integer(self, x: Tensor) -> Any:
        known = self._known.get(id(x))
        return int(known[1]) if known is not None and known[1].dim() == 0 else x
