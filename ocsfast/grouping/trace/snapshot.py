"""Everything that a model's forward pass can reach by Python references, as it was at one moment.

A pass may keep activations, grids and counters in attributes, lists, dicts, classes and objects, and its
hooks write wherever they like. While the model is traced these are tensors without data, which must
not stay behind.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.grouping.trace.memory import (
    CACHED,
    CONTAINERS,
    EMPTY,
    Cache,
    Cell,
    ClassAttributes,
    Entries,
    Generator,
    Global,
    Items,
    Memory,
    Slot,
    Training,
    Values,
    content,
    dict_of,
    entries_of,
    generator_of,
    is_dunder,
    items_of,
    own_attribute,
    spoken,
)
from ocsfast.grouping.trace.trees import leaves_with_paths

# A hook may be a trainer's method, and a trainer leads to its data, its queues and its loggers. These
# limits end the search there: steps from the last module, entries of one container, objects in all.
DEPTH, LONGEST, MOST_OBJECTS = 6, 10_000, 200_000
# Tensors that are neither parameters nor buffers are remembered up to this many elements each, and in
# all. Larger ones are listed in `Snapshot.large`.
LARGE, MOST_ELEMENTS = 2**22, 2**24
# No forward pass keeps its results in objects of these packages (torch's modules excepted), and other
# threads may be writing to the standard library's, such as queues.
FOREIGN = {"ocsfast", "torch", "numpy", *sys.stdlib_module_names}
PLAIN = (types.SimpleNamespace,)  # of the standard library, but made to hold what users put there
# Both reading and restoring go through the memories kind by kind, in this order.
ORDER = (Entries, Items, Slot, Cell, Global, ClassAttributes, Cache, Values, Training, Generator)


class Snapshot:
    """What a model's forward pass can reach and write to, as it was when this was made.

    Args:
        model: where the search begins.
        weights: whether the parameters' numbers are remembered too. A pass that runs on real numbers
            may change them, and so may a `train()` of the user's own.
        values: whether the numbers in other tensors are remembered.
    """

    def __init__(self, model: nn.Module, *, weights: bool = False, values: bool = True) -> None:
        self.others: list[Any] = []  # objects that are no module, tensor, container or function
        self.large: list[Any] = []  # tensors and containers beyond the limits, no state of a module
        self._memories: dict[type, list[Memory]] = {kind: [] for kind in ORDER}
        held = [t for m in model.modules() for t in (m._parameters, m._buffers)]
        self._state = {id(t) for t in held}
        self._buffers = {id(b) for b in model.buffers()}
        self._parameters = {id(p) for p in model.parameters()}
        self._values, self._elements = values, 0
        self._seen: set[int] = set()
        self._globals: set[tuple[int, str]] = set()
        self._classes: set[type] = set()
        self._depth = 0  # steps from the last module; a function or class counts as two
        self._waiting: deque[tuple[str, Any, int]] = deque([("", model, 0)])
        while self._waiting and len(self._seen) < MOST_OBJECTS:
            label, thing, depth = self._waiting.popleft()
            self._depth = 0 if issubclass(type(thing), nn.Module) else depth
            self._look_at(label, thing)
        self._waiting.clear()
        for parameter in model.parameters():
            self._remember(Training(parameter, parameter.requires_grad, parameter.grad))
            if weights:
                self._remember(Values(parameter, parameter.detach().clone()))

    def left_behind(self) -> dict[str, Tensor]:
        """Tensors that were written since, by place. Parameters and buffers are not among them."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()

        def note(label: str, value: Any, depth: int = 0) -> None:
            for path, leaf in leaves_with_paths(value):
                place = f"{label}{pytree.keystr(path)}"
                if issubclass(type(leaf), Tensor):
                    found.setdefault(place, leaf)
                elif id(leaf) not in seen and depth < DEPTH and _holds_attributes(leaf):
                    seen.add(id(leaf))
                    slots = {name: own_attribute(leaf, name) for name in _slots_of(type(leaf))}
                    for name, inner in {**dict_of(leaf), **slots}.items():
                        note(f"{place}.{name}", inner, depth + 1)

        for memory in self._ordered():
            for place, value in memory.written():
                note(place, value)
        return found

    def bypass_caches(self) -> None:
        """Until `restore`, call what is behind `functools.cache` anew each time.

        A cache takes equal integers for the same, so in a trace the second block would be given what was
        made of the first one's attributes.
        """
        for memory in self._ordered():
            if isinstance(memory, (Entries, Cell, Global, ClassAttributes)):
                memory.bypass_caches()

    def restore(self) -> None:
        """Put everything back, in place."""
        for memory in self._ordered():
            memory.restore()

    def _ordered(self) -> Iterator[Memory]:
        for kind in ORDER:
            yield from self._memories[kind]

    def _remember(self, memory: Memory) -> None:
        self._memories[type(memory)].append(memory)

    # -- the search -------------------------------------------------------------------------------

    def _later(self, *things: tuple[str, Any]) -> None:
        """Look at these when what is nearer to the model has been looked at."""
        for label, thing in things:
            self._waiting.append((label, thing, self._depth))

    def _closer(self, steps: int) -> bool:
        """Go so many steps further from the last module; whether that is still near enough."""
        self._depth += steps
        return self._depth <= DEPTH

    def _look_at(self, label: str, thing: Any) -> None:
        # Types are compared by type() and not by isinstance(), which a lazy proxy would answer by
        # importing the module that it stands for.
        kind = type(thing)
        if thing is None or issubclass(kind, (int, float, str, bytes)) or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if issubclass(kind, Tensor):
            self._tensor(thing)
        elif issubclass(kind, CONTAINERS):
            self._container(label, thing)
        elif kind is types.FunctionType:
            if self._closer(2):
                self._function(thing)
        elif kind is types.MethodType:
            self._later((label, thing.__self__), (label, thing.__func__))
        elif kind is CACHED:
            self._remember(Cache(thing, thing.cache_info().misses))
            self._later((label, thing.__wrapped__))
        elif issubclass(kind, partial):
            self._later((label, thing.func), (label, thing.args), (label, thing.keywords))
        elif issubclass(kind, type):
            if self._closer(2):
                self._class(thing)
        elif issubclass(kind, nn.Module):
            self._class(kind)
            self._attributes(label, thing)
        elif kind.__name__ == "_WrappedHook":  # torch wraps a hook that wants its module
            self._later((label, thing.hook))
        else:
            self._object(label, thing)

    def _tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._parameters or tensor.is_inference() or tensor.layout is not torch.strided:
            return
        if type(tensor) is not Tensor or tensor.device.type == "meta":
            return
        if id(tensor) not in self._buffers:
            self._elements += tensor.numel()
            if tensor.numel() > LARGE or self._elements > MOST_ELEMENTS:
                self.large.append(tensor)
                return
        if self._values:
            self._remember(Values(tensor, tensor.detach().clone()))

    def _container(self, label: str, thing: Any) -> None:
        kind = type(thing)
        if issubclass(kind, dict):
            held = self._entries(label, thing)
            entries = [(f"{label}[{spoken(key)}]", value) for key, value in held.items()]
        else:
            items = items_of(thing)
            if not issubclass(kind, tuple):
                self._remember(Items(label, thing, items))
            entries = [(f"{label}[{n}]", value) for n, value in enumerate(items)]
        if kind not in CONTAINERS and not _is_foreign(kind.__module__):
            self._attributes(label, thing)
        if len(entries) <= LONGEST:
            self._later(*entries)
        else:
            self.large.append(thing)

    def _entries(self, label: str, thing: dict[Any, Any]) -> dict[Any, Any]:
        held = entries_of(thing)
        self._remember(Entries(label, thing, held, is_state=id(thing) in self._state))
        return held

    def _object(self, label: str, thing: Any) -> None:
        self.others.append(thing)
        generator = generator_of(thing)
        if generator is not None:
            self._remember(generator)
            return
        kind = type(thing)
        if kind is types.ModuleType or (_is_foreign(kind.__module__) and kind not in PLAIN):
            return
        if self._closer(1):
            self._class(kind)
            self._attributes(label, thing)

    def _attributes(self, label: str, thing: Any) -> None:
        dot = f"{label}." if label else ""
        for name in _slots_of(type(thing)):
            value = own_attribute(thing, name)
            self._remember(Slot(f"{dot}{name}", thing, name, value))
            self._later((f"{dot}{name}", value))
        own = dict_of(thing)
        if id(own) in self._seen:
            return
        self._seen.add(id(own))
        self._entries(label, own)
        for name, value in own.items():
            if name == "_modules" and issubclass(type(thing), nn.Module):
                self._seen.add(id(value))
                self._entries(label, value)
                self._later(*((f"{dot}{child}", module) for child, module in value.items()))
            else:
                hooks = name.endswith("_hooks") and issubclass(type(thing), nn.Module)
                self._later((f"{dot}hook" if hooks else f"{dot}{name}", value))

    def _function(self, function: types.FunctionType) -> None:
        """The variables that a function closes over, its defaults, and the globals that it names."""
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            value = content(cell)
            self._remember(Cell(name, cell, value))
            self._later((name, value))
        self._later(("a default", function.__defaults__), ("a default", function.__kwdefaults__))
        self._globals_of(function)

    def _globals_of(self, function: types.FunctionType) -> None:
        """The globals that a function's code names, in its own module and in those that it imports."""
        for name, value in list(function.__globals__.items()):
            if type(value) is CACHED and not _is_foreign(function.__globals__.get("__name__")):
                self._global(function.__globals__, name)
        codes = [function.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            for name in code.co_names:
                self._global(function.__globals__, name)
                module = function.__globals__.get(name)
                if type(module) is types.ModuleType and not _is_foreign(module.__name__):
                    for other in code.co_names:
                        self._global(vars(module), other)

    def _global(self, known: dict[str, Any], name: str) -> None:
        value = known.get(name, EMPTY)
        if type(value) is types.ModuleType:
            return
        if issubclass(type(value), (type, types.FunctionType)):
            if not _is_foreign(value.__module__):
                self._later((name, value))
            return
        if (id(known), name) not in self._globals:
            self._globals.add((id(known), name))
            self._remember(Global(name, known, value))
        if value is not EMPTY:
            self._later((name, value))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base in self._classes or _is_foreign(base.__module__):
                continue
            own = {name: value for name, value in vars(base).items() if not is_dunder(name)}
            self._classes.add(base)
            self._remember(ClassAttributes(base, own))
            for name, value in own.items():
                wrapped = issubclass(type(value), (staticmethod, classmethod))
                function = value.__func__ if wrapped else value
                if type(function) is types.FunctionType:
                    self._globals_of(function)
                elif issubclass(type(function), (dict, list, set, deque, Tensor, CACHED)):
                    self._later((f"{base.__name__}.{name}", function))


def _slots_of(kind: type) -> list[str]:
    """The attributes that a class and its bases declare in `__slots__`."""
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        found += [n for n in names if not n.startswith("__") and not _is_foreign(base.__module__)]
    # A property of a subclass may hide a slot; what it gives is computed, and cannot be put back.
    return [n for n in found if inspect.ismemberdescriptor(inspect.getattr_static(kind, n, None))]


def _holds_attributes(thing: Any) -> bool:
    """Whether tensors in the attributes of this object may be a by-product of the pass."""
    kind = type(thing)
    return kind in PLAIN or not (_is_foreign(kind.__module__) or issubclass(kind, (nn.Module, type)))


def _is_foreign(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in FOREIGN
