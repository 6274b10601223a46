"""What a forward pass writes, taken back: tracing a model must leave nothing behind in it.

A pass may keep activations, grids and counters in attributes, lists, dicts, class attributes and
whatever its hooks write to. While it is traced these would be tensors without data.
"""

from __future__ import annotations

import copy
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# A trainer that a hook belongs to leads to its data, its queues and its loggers. So no reference further
# from a module is followed, no list or dict that is longer is looked at, and not more objects.
DEPTH, LONGEST, MOST_OBJECTS = 6, 10_000, 200_000
# Objects of these packages are no place where a forward pass writes; torch's modules are looked at. What
# the standard library makes, as queues, other threads may be writing to.
FOREIGN = {"torch", "numpy", *sys.stdlib_module_names}
PLAIN = (types.SimpleNamespace,)  # but these hold what they are given


class Kept:
    """Everything that a model's forward pass can reach and write to, as it was when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._dicts: list[tuple[str, dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[str, Any, list[Any]]] = []  # lists, sets and deques
        self._cells: list[tuple[str, types.CellType, Any]] = []
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}
        self._classes: dict[type, dict[str, Any]] = {}
        self.others: list[Any] = []  # neither modules nor tensors, containers or functions
        self._caches: list[tuple[Any, int]] = []  # of functools, each with its misses
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._grads = [(p, p.grad) for p in model.parameters()]
        self._state = {id(t) for m in model.modules() for t in (m._parameters, m._buffers)}
        self._weights = {id(p) for p in model.parameters()}
        self._seen: set[int] = set()
        self._waiting: deque[tuple[str, Any, int]] = deque([("", model, 0)])
        self._depth = 0  # references from the last module to what is looked at
        while self._waiting and len(self._seen) < MOST_OBJECTS:
            label, thing, depth = self._waiting.popleft()
            self._depth = 0 if issubclass(type(thing), nn.Module) else depth
            self._look_at(label, thing)
        self._waiting.clear()

    # -- looking ----------------------------------------------------------------------------------

    def _later(self, *things: tuple[str, Any]) -> None:
        for label, thing in things:
            if self._depth < DEPTH or issubclass(type(thing), nn.Module):
                self._waiting.append((label, thing, self._depth + 1))

    def _look_at(self, label: str, thing: Any) -> None:
        # By type() and not isinstance(): a lazy proxy answers that by importing what it stands for.
        kind = type(thing)
        if thing is None or issubclass(kind, (int, float, str, bytes, type)):
            return
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if issubclass(kind, Tensor):
            self._tensor(thing)
        elif issubclass(kind, dict):
            if len(thing) <= LONGEST:
                self._dicts.append((label, thing, dict(thing)))
                self._later(*((f"{label}[{key!r}]", value) for key, value in thing.items()))
        elif issubclass(kind, (list, set, deque)):
            if len(thing) <= LONGEST:
                self._lists.append((label, thing, list(thing)))
                self._later(*((f"{label}[{n}]", value) for n, value in enumerate(thing)))
        elif issubclass(kind, tuple):
            if len(thing) <= LONGEST:
                self._later(*((f"{label}[{n}]", value) for n, value in enumerate(thing)))
        elif kind is types.FunctionType:
            self._function(thing)
        elif kind is types.MethodType:
            self._later((label, thing.__self__), (label, thing.__func__))
        elif kind is _Cached:
            self._caches.append((thing, thing.cache_info().misses))
            self._later((label, thing.__wrapped__))
        elif issubclass(kind, partial):
            self._later((label, thing.func), (label, thing.args), (label, thing.keywords))
        elif issubclass(kind, nn.Module):
            self._class(kind)
            self._attributes(label, thing)
        elif kind.__name__ == "_WrappedHook":  # torch's own, around a hook with its module
            self._later((label, thing.hook))
        else:
            self.others.append(thing)
            if kind not in PLAIN and (kind is types.ModuleType or _is_foreign(kind.__module__)):
                return
            self._class(kind)
            self._attributes(label, thing)

    def _attributes(self, label: str, thing: Any) -> None:
        own = getattr(thing, "__dict__", None)
        if type(own) is not dict or id(own) in self._seen:
            return
        self._seen.add(id(own))
        self._dicts.append((label, own, dict(own)))
        dot = f"{label}." if label else ""
        for name, value in own.items():
            if name == "_modules" and isinstance(thing, nn.Module):
                self._seen.add(id(value))
                self._dicts.append((label, value, dict(value)))
                self._later(*((f"{dot}{child}", module) for child, module in value.items()))
            else:
                self._later((f"{dot}{name}", value))

    def _function(self, function: types.FunctionType) -> None:
        """What it closes over, its defaults, and the names of its module that it knows."""
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            content = _content(cell)
            self._cells.append((name, cell, content))
            self._later((name, content))
        self._later(("a default", function.__defaults__))
        self._later(("a default", function.__kwdefaults__))
        self._names_of(function)

    def _names_of(self, function: types.FunctionType) -> None:
        """The names of its module, and of modules that it imports, that a function's code mentions."""
        codes = [function.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            for name in code.co_names:
                self._name(function.__globals__, name)
                module = function.__globals__.get(name)
                if type(module) is types.ModuleType and not _is_foreign(module.__name__):
                    for other in code.co_names:
                        self._name(vars(module), other)

    def _name(self, known: dict[str, Any], name: str) -> None:
        value = known.get(name, _EMPTY)
        if value is _EMPTY or isinstance(value, (type, types.ModuleType)):
            return
        if type(value) is types.FunctionType:
            if not _is_foreign(value.__module__):
                self._later((name, value))
            return
        self._globals.setdefault((id(known), name), (known, value))
        if isinstance(value, (dict, list, set, deque, _Cached)):
            self._later((name, value))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base in self._classes or _is_foreign(base.__module__):
                continue
            own = {n: v for n, v in vars(base).items() if not (n.startswith("__") and n.endswith("__"))}
            self._classes[base] = own
            for name, value in own.items():
                function = getattr(value, "__func__", value)  # static and class methods
                if isinstance(function, types.FunctionType):
                    self._names_of(function)
                elif isinstance(value, (dict, list, set, deque, Tensor, _Cached)):
                    self._later((f"{base.__name__}.{name}", value))

    def _tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._weights or tensor.is_inference() or tensor.layout is not torch.strided:
            return
        if type(tensor) is Tensor and tensor.device.type != "meta":
            self._tensors.append((tensor, tensor._version, tensor.detach().clone()))

    # -- what has changed -------------------------------------------------------------------------

    def left_behind(self) -> dict[str, Tensor]:
        """Tensors that were written since, by the place where they lie: no parameters, no buffers."""
        found: dict[str, Tensor] = {}

        def note(label: str, value: Any) -> None:
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if isinstance(leaf, Tensor):
                    found.setdefault(f"{label}{pytree.keystr(path)}", leaf)

        for label, thing, before in self._dicts:
            if id(thing) in self._state:
                continue
            for key, value in thing.items():
                if value is not before.get(key, self):
                    note(
                        f"{label}.{key}".lstrip(".") if isinstance(key, str) else f"{label}[{key}]",
                        value,
                    )
        for label, sequence, entries in self._lists:
            known = {id(entry) for entry in entries}
            for n, value in enumerate(sequence):
                if id(value) not in known:
                    note(f"{label}[{n}]", value)
        for label, cell, content in self._cells:
            if _content(cell) is not content:
                note(label, _content(cell))
        for (_, name), (module, value) in self._globals.items():
            if module.get(name) is not value:
                note(name, module.get(name))
        for kind, attributes in self._classes.items():
            for name, value in vars(kind).items():
                if isinstance(value, Tensor) and attributes.get(name) is not value:
                    note(f"{kind.__name__}.{name}", value)
        return found

    def restore(self) -> None:
        """Put everything back, in place."""
        for _, thing, before in self._dicts:
            same = len(thing) == len(before) and all(
                a is b and v is w for (a, v), (b, w) in zip(thing.items(), before.items(), strict=True)
            )
            if not same:
                kind: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
                kind.clear(thing)
                kind.update(thing, before)
        for _, sequence, entries in self._lists:
            if len(sequence) != len(entries) or any(
                a is not b for a, b in zip(sequence, entries, strict=True)
            ):
                sequence.clear()
                (sequence.update if isinstance(sequence, set) else sequence.extend)(entries)
        for _, cell, content in self._cells:
            if _content(cell) is content:
                continue
            if content is _EMPTY:
                del cell.cell_contents
            else:
                cell.cell_contents = content
        for (_, name), (module, value) in self._globals.items():
            module[name] = value
        for owner, attributes in self._classes.items():
            for name, value in list(vars(owner).items()):
                if name not in attributes and not (name.startswith("__") and name.endswith("__")):
                    delattr(owner, name)
                elif name in attributes and value is not attributes[name]:
                    setattr(owner, name, attributes[name])
            for name in attributes.keys() - vars(owner).keys():
                setattr(owner, name, attributes[name])
        for cached, misses in self._caches:  # what it learned are tensors without data
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        for tensor, version, value in self._tensors:
            if tensor._version != version and tensor.shape == value.shape:
                tensor.data.copy_(value)
        for parameter, grad in self._grads:
            if parameter.grad is not grad:
                parameter.grad = grad


_Cached = type(cache(lambda: None))  # what functools.cache and lru_cache make of a function


def _is_foreign(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in FOREIGN


_EMPTY = object()  # a variable of an enclosing function that has no value yet


def _content(cell: types.CellType) -> Any:
    with suppress(ValueError):
        return cell.cell_contents
    return _EMPTY


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[Kept]:
    """Afterwards the model, and every generator of random numbers, is as it was.

    Attributes, containers, classes, hooks' stores, buffers, gradients, modes: whatever the forward pass
    can reach by Python references from the model.
    """
    kept = Kept(model)
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    devices = None if device_type == "cpu" else [device_type]
    numbers = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[] if devices is None else None):
        try:
            yield kept
        finally:
            kept.restore()
            random.setstate(numbers)
            if of_numpy is not None:
                numpy.random.set_state(of_numpy)


def copied(model: nn.Module, *, double: bool = False) -> nn.Module:
    """A deep copy, whatever else than parameters and buffers the model holds.

    Tensors that are no leaves, as old weight_norm leaves them, are copied by their values; objects that
    refuse, as locks and open files do, are shared.

    Args:
        double: whether floating-point tensors become float64, also where no module knows of them.
    """
    with _Copying(double):
        try:
            copy_of = copy.deepcopy(model)
        except Exception:
            shared = {id(thing): thing for thing in Kept(model).others if not _copies(thing)}
            if not shared:
                raise
            copy_of = copy.deepcopy(model, shared)
    return copy_of.double() if double else copy_of


def _copies(thing: Any) -> bool:
    try:
        copy.deepcopy(thing)
    except Exception:
        return False
    return True


class _Copying(TorchFunctionMode):
    def __init__(self, double: bool) -> None:
        super().__init__()
        self._double = double

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and type(args[0]) is Tensor and args[0].device.type != "meta":
            tensor, memo = args
            if id(tensor) not in memo:
                value = tensor.detach().clone()
                memo[id(tensor)] = (
                    value.double() if self._double and value.is_floating_point() else value
                )
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
