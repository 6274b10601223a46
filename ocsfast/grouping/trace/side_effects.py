"""What a forward pass writes, taken back: tracing a model must leave nothing behind in it.

A pass may keep activations, grids and counters in attributes, lists, dicts, classes, objects and in
whatever its hooks write to. While it is traced these would be tensors without data.
"""

from __future__ import annotations

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
from torch.utils import _pytree as pytree

# A trainer that a hook belongs to leads to its data, its queues and its loggers. So no longer chains of
# objects are followed, no entries of longer lists and dicts are looked at, and not more in all.
DEPTH, LONGEST, MOST_OBJECTS = 6, 10_000, 200_000
# Elements of a tensor that is neither parameter nor buffer, and of all of these: beyond it, shared.
LARGE, MOST_ELEMENTS = 2**22, 2**24
# Objects of these packages are no place where a forward pass writes; torch's modules are looked at. What
# the standard library makes, as queues, other threads may be writing to.
FOREIGN = {"ocsfast", "torch", "numpy", *sys.stdlib_module_names}
PLAIN = (types.SimpleNamespace,)  # but these hold what they are given
Restore = Callable[[], None]


class Kept:
    """Everything that a model's forward pass can reach and write to, as it was when this was made.

    Args:
        weights: whether to keep the values of the parameters too, which a pass that is really run, or a
            `train()` of the user's own, may change.
        values: whether to keep those of other tensors.
    """

    def __init__(self, model: nn.Module, *, weights: bool = False, values: bool = True) -> None:
        self._dicts: list[tuple[str, dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[str, Any, list[Any]]] = []  # lists, sets and deques
        self._slots: list[tuple[str, Any, str, Any]] = []
        self._cells: list[tuple[str, types.CellType, Any]] = []
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}
        self._classes: dict[type, dict[str, Any]] = {}
        self._caches: list[tuple[Any, int]] = []  # of functools, each with its misses
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._generators: list[Restore] = []
        self.others: list[Any] = []  # neither modules nor tensors, containers or functions
        self.large: list[Any] = []  # tensors and containers that are no part of a module's state
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._weights = [(p, p.detach().clone()) for p in model.parameters()] if weights else []
        held = [t for m in model.modules() for t in (m._parameters, m._buffers)]
        self._state = {id(t) for t in held}
        self._buffers = {id(b) for b in model.buffers()}
        self._values, self._elements = values, 0
        self._known = {id(p) for p in model.parameters()}
        self._seen: set[int] = set()
        self._waiting: deque[tuple[str, Any, int]] = deque([("", model, 0)])
        self._depth = 0  # from the last module to what is looked at: objects, and twice the functions
        while self._waiting and len(self._seen) < MOST_OBJECTS:
            label, thing, depth = self._waiting.popleft()
            self._depth = 0 if issubclass(type(thing), nn.Module) else depth
            self._look_at(label, thing)
        self._waiting.clear()

    # -- looking ----------------------------------------------------------------------------------

    def _later(self, *things: tuple[str, Any]) -> None:
        for label, thing in things:
            self._waiting.append((label, thing, self._depth))

    def _look_at(self, label: str, thing: Any) -> None:
        # By type() and not isinstance(): a lazy proxy answers that by importing what it stands for.
        kind = type(thing)
        if thing is None or issubclass(kind, (int, float, str, bytes)) or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if issubclass(kind, Tensor):
            self._tensor(thing)
        elif issubclass(kind, (dict, list, set, deque, tuple)):
            self._container(label, thing)
        elif kind is types.FunctionType:
            if self._closer(2):
                self._function(thing)
        elif kind is types.MethodType:
            self._later((label, thing.__self__), (label, thing.__func__))
        elif kind is _Cached:
            self._caches.append((thing, thing.cache_info().misses))
            self._later((label, thing.__wrapped__))
        elif issubclass(kind, partial):
            self._later((label, thing.func), (label, thing.args), (label, thing.keywords))
        elif issubclass(kind, type):
            if self._closer(2):
                self._class(thing)
        elif issubclass(kind, nn.Module):
            self._class(kind)
            self._attributes(label, thing)
        elif kind.__name__ == "_WrappedHook":  # torch's own, around a hook with its module
            self._later((label, thing.hook))
        else:
            self._object(label, thing)

    def _container(self, label: str, thing: Any) -> None:
        if issubclass(type(thing), dict):
            self._dicts.append((label, thing, dict(thing)))
            entries = [(f"{label}[{key!r}]", value) for key, value in thing.items()]
        else:
            if not issubclass(type(thing), tuple):
                self._lists.append((label, thing, list(thing)))
            entries = [(f"{label}[{n}]", value) for n, value in enumerate(thing)]
        if len(entries) <= LONGEST:
            self._later(*entries)
        else:
            self.large.append(thing)

    def _object(self, label: str, thing: Any) -> None:
        self.others.append(thing)
        state = _generator(thing)
        if state is not None:
            self._generators.append(state)
            return
        kind = type(thing)
        if kind is types.ModuleType or (_is_foreign(kind.__module__) and kind not in PLAIN):
            return
        if self._closer(1):
            self._class(kind)
            self._attributes(label, thing)

    def _closer(self, steps: int) -> bool:
        """Whether what is so many steps further from the last module is still looked at."""
        self._depth += steps
        return self._depth <= DEPTH

    def _attributes(self, label: str, thing: Any) -> None:
        dot = f"{label}." if label else ""
        for name in _slots_of(type(thing)):
            value = getattr(thing, name, _EMPTY)
            self._slots.append((f"{dot}{name}", thing, name, value))
            self._later((f"{dot}{name}", value))
        own = getattr(thing, "__dict__", None)
        if type(own) is not dict or id(own) in self._seen:
            return
        self._seen.add(id(own))
        self._dicts.append((label, own, dict(own)))
        for name, value in own.items():
            if name == "_modules" and isinstance(thing, nn.Module):
                self._seen.add(id(value))
                self._dicts.append((label, value, dict(value)))
                self._later(*((f"{dot}{child}", module) for child, module in value.items()))
            else:
                hooks = name.endswith("_hooks") and isinstance(thing, nn.Module)
                self._later((f"{dot}hook" if hooks else f"{dot}{name}", value))

    def _function(self, function: types.FunctionType) -> None:
        """What it closes over, its defaults, and the names of its module that it knows."""
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            content = _content(cell)
            self._cells.append((name, cell, content))
            self._later((name, content))
        self._later(("a default", function.__defaults__), ("a default", function.__kwdefaults__))
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
        if type(value) is types.ModuleType:
            return
        if issubclass(type(value), (type, types.FunctionType)):
            if not _is_foreign(value.__module__):
                self._later((name, value))
            return
        self._globals.setdefault((id(known), name), (known, value))
        if value is not _EMPTY:
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
        if id(tensor) in self._known or tensor.is_inference() or tensor.layout is not torch.strided:
            return
        if type(tensor) is not Tensor or tensor.device.type == "meta":
            return
        if id(tensor) not in self._buffers:
            self._elements += tensor.numel()
            if tensor.numel() > LARGE or self._elements > MOST_ELEMENTS:
                self.large.append(tensor)
                return
        if self._values:
            self._tensors.append((tensor, tensor.detach().clone()))

    # -- what has changed -------------------------------------------------------------------------

    def left_behind(self) -> dict[str, Tensor]:
        """Tensors that were written since, by the place where they lie: no parameters, no buffers."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()

        def note(label: str, value: Any, depth: int = 0) -> None:
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                place = f"{label}{pytree.keystr(path)}"
                if isinstance(leaf, Tensor):
                    found.setdefault(place, leaf)
                elif id(leaf) not in seen and depth < DEPTH and _holds_attributes(leaf):
                    seen.add(id(leaf))
                    attributes = {n: getattr(leaf, n, None) for n in _slots_of(type(leaf))}
                    for name, inner in {**getattr(leaf, "__dict__", {}), **attributes}.items():
                        note(f"{place}.{name}", inner, depth + 1)

        for label, thing, before in self._dicts:
            if id(thing) in self._state:
                continue
            for key, value in thing.items():
                if value is not before.get(key, self):
                    place = f".{key}" if isinstance(key, str) else f"[{key!r}]"
                    note(f"{label}{place}".lstrip("."), value)
        for label, sequence, entries in self._lists:
            known = set(map(id, entries))
            for n, value in enumerate(sequence):
                if id(value) not in known:
                    note(f"{label}[{n}]", value)
        for label, thing, name, value in self._slots:
            if getattr(thing, name, _EMPTY) is not value:
                note(label, getattr(thing, name, None))
        for label, cell, content in self._cells:
            if _content(cell) is not content:
                note(label, _content(cell))
        for (_, name), (module, value) in self._globals.items():
            if module.get(name, _EMPTY) is not value:
                note(name, module.get(name))
        for kind, own in self._classes.items():
            for name, value in vars(kind).items():
                if isinstance(value, Tensor) and own.get(name) is not value:
                    note(f"{kind.__name__}.{name}", value)
        return found

    def restore(self) -> None:
        """Put everything back, in place."""
        for _, thing, before in self._dicts:
            _restore_dict(thing, before)
        for _, sequence, entries in self._lists:
            if len(sequence) != len(entries) or any(
                a is not b for a, b in zip(sequence, entries, strict=True)
            ):
                sequence.clear()
                (sequence.update if isinstance(sequence, set) else sequence.extend)(entries)
        for _, thing, name, value in self._slots:
            if getattr(thing, name, _EMPTY) is not value:
                delattr(thing, name) if value is _EMPTY else setattr(thing, name, value)
        for _, cell, content in self._cells:
            if _content(cell) is content:
                continue
            if content is _EMPTY:
                del cell.cell_contents
            else:
                cell.cell_contents = content
        for (_, name), (module, value) in self._globals.items():
            if value is _EMPTY:
                module.pop(name, None)
            else:
                module[name] = value
        for owner, own in self._classes.items():
            _restore_class(owner, own)
        for cached, misses in self._caches:  # what it learned are tensors without data
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        for tensor, value in (*self._tensors, *self._weights):
            if tensor.shape != value.shape:
                tensor.data = value
            elif not torch.equal(tensor, value):
                tensor.data.copy_(value)
        for parameter, trains, grad in self._parameters:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
            if parameter.grad is not grad:
                parameter.grad = grad
        for generator in self._generators:
            generator()


def _restore_dict(thing: dict[Any, Any], before: dict[Any, Any]) -> None:
    same = len(thing) == len(before) and all(
        a is b and v is w for (a, v), (b, w) in zip(thing.items(), before.items(), strict=True)
    )
    if not same:
        kind: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
        kind.clear(thing)
        kind.update(thing, before)


def _restore_class(owner: type, own: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in own and not (name.startswith("__") and name.endswith("__")):
            delattr(owner, name)
        elif name in own and value is not own[name]:
            setattr(owner, name, own[name])
    for name in own.keys() - vars(owner).keys():
        setattr(owner, name, own[name])


def _generator(thing: Any) -> Restore | None:
    """What puts a generator of random numbers back; None for anything else."""
    if isinstance(thing, random.Random):
        return partial(thing.setstate, thing.getstate())
    if isinstance(thing, torch.Generator):
        return partial(_set_state, thing, thing.get_state())
    bits = getattr(thing, "bit_generator", None) if type(thing).__module__.startswith("numpy") else None
    return None if bits is None else partial(setattr, bits, "state", bits.state)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _slots_of(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        found += [n for n in names if not n.startswith("__") and not _is_foreign(base.__module__)]
    return found


def _holds_attributes(thing: Any) -> bool:
    kind = type(thing)
    return kind in PLAIN or not (_is_foreign(kind.__module__) or issubclass(kind, (nn.Module, type)))


_Cached = type(cache(lambda: None))  # what functools.cache and lru_cache make of a function


def _is_foreign(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in FOREIGN


_EMPTY: Any = object()  # stands for a variable, a slot or a global that has no value yet


def _content(cell: types.CellType) -> Any:
    with suppress(ValueError):
        return cell.cell_contents
    return _EMPTY


@contextmanager
def as_it_was(model: nn.Module, *, weights: bool = False) -> Iterator[Kept]:
    """Afterwards the model, and every generator of random numbers, is as it was.

    Attributes, containers, classes, hooks' stores, buffers, gradients, modes: whatever the forward pass
    can reach by Python references from the model.

    Args:
        weights: whether the parameters' values may change as well.
    """
    kept = Kept(model, weights=weights)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    numbers = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[] if on_cpu else None):
        try:
            yield kept
        finally:
            kept.restore()
            random.setstate(numbers)
            if of_numpy is not None:
                numpy.random.set_state(of_numpy)
