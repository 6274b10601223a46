"""Things that a forward pass may write to, each with its content from before the pass.

Every class here remembers one kind of thing (a dict, a list, a closure's variable ...). It can say what
was written there since, and it can put the old content back in place, so that references to the thing
stay valid.
"""

from __future__ import annotations

import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

EMPTY: Any = object()  # stands for a variable, a slot or a global that has no value
CACHED = type(cache(lambda: None))  # the type of every function behind functools.cache or lru_cache
# A subclass may answer by its own means, as a lazy mapping imports what it is asked for, so containers
# are read and written by the methods of these.
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, tuple)


def base_of(thing: Any) -> Any:
    """The type of CONTAINERS that a container is, or that its class is made of."""
    return next(base for base in CONTAINERS if issubclass(type(thing), base))


def entries_of(thing: dict[Any, Any]) -> dict[Any, Any]:
    """What a dict holds, in order, as a plain one."""
    return dict(base_of(thing).items(thing))


def items_of(thing: Any) -> list[Any]:
    """What a list, a tuple, a set or a deque holds."""
    return list(base_of(thing).__iter__(thing))


def spoken(key: Any) -> str:
    """A key of a dict, for places."""
    with suppress(Exception):  # its class may be the user's
        return repr(key)
    return type(key).__name__


class Memory(Protocol):
    """One thing, and what it held."""

    def written(self) -> Iterator[tuple[str, Any]]:
        """What the thing holds now and did not hold before: (place, value)."""

    def restore(self) -> None:
        """Put the old content back."""


class Uncached:
    """A function behind `functools.cache` that computes its result anew each time."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function.__wrapped__(*args, **kwargs)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncached:
        return self

    def __getattr__(self, name: str) -> Any:  # cache_info, cache_clear, __wrapped__
        return getattr(self._function, name)


def uncached(value: Any) -> Any:
    """An `Uncached` where the value is a function behind `functools.cache`, else the value itself."""
    if issubclass(type(value), (staticmethod, classmethod)):
        inner = uncached(value.__func__)
        return value if inner is value.__func__ else type(value)(inner)
    return Uncached(value) if type(value) is CACHED else value


@dataclass(frozen=True, eq=False, slots=True)
class Entries:
    """The entries of a dict, in order; a module's attributes are such a dict."""

    label: str
    thing: dict[Any, Any]
    before: dict[Any, Any]
    is_state: bool  # whether the dict holds a module's parameters or buffers, which are no by-product

    def written(self) -> Iterator[tuple[str, Any]]:
        if self.is_state:
            return
        for key, value in entries_of(self.thing).items():
            if value is not self.before.get(key, EMPTY):
                place = f".{key}" if isinstance(key, str) else f"[{spoken(key)}]"
                yield f"{self.label}{place}".lstrip("."), value

    def bypass_caches(self) -> None:
        for key, value in self.before.items():
            if type(value) is CACHED:
                base_of(self.thing).__setitem__(self.thing, key, uncached(value))

    def restore(self) -> None:
        now = entries_of(self.thing)
        same = len(now) == len(self.before) and all(
            a is b and v is w for (a, v), (b, w) in zip(now.items(), self.before.items(), strict=True)
        )
        if not same:
            kind = base_of(self.thing)
            kind.clear(self.thing)
            for key, value in self.before.items():
                kind.__setitem__(self.thing, key, value)


@dataclass(frozen=True, eq=False, slots=True)
class Items:
    """The items of a list, a set or a deque."""

    label: str
    thing: Any
    before: list[Any]

    def written(self) -> Iterator[tuple[str, Any]]:
        known = set(map(id, self.before))
        for n, value in enumerate(items_of(self.thing)):
            if id(value) not in known:
                yield f"{self.label}[{n}]", value

    def restore(self) -> None:
        now, kind = items_of(self.thing), base_of(self.thing)
        if len(now) != len(self.before) or any(
            a is not b for a, b in zip(now, self.before, strict=True)
        ):
            kind.clear(self.thing)
            (kind.update if kind is set else kind.extend)(self.thing, self.before)


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """One attribute of an object whose class declares `__slots__`."""

    label: str
    thing: Any
    name: str
    before: Any

    def written(self) -> Iterator[tuple[str, Any]]:
        now = own_attribute(self.thing, self.name)
        if now is not self.before:
            yield self.label, None if now is EMPTY else now

    def restore(self) -> None:
        if own_attribute(self.thing, self.name) is self.before:
            return
        if self.before is EMPTY:
            object.__delattr__(self.thing, self.name)
        else:
            object.__setattr__(self.thing, self.name, self.before)


def own_attribute(thing: Any, name: str) -> Any:
    """An attribute without the class's own ways of looking it up; EMPTY where there is none."""
    with suppress(AttributeError):
        return object.__getattribute__(thing, name)
    return EMPTY


def dict_of(thing: Any) -> dict[str, Any]:
    """The attributes of an object; an empty dict where it has none, or says otherwise."""
    with suppress(Exception):  # a proxy's `__dict__` may be that of what it stands for
        own = object.__getattribute__(thing, "__dict__")
        if type(own) is dict:
            return own
    return {}


@dataclass(frozen=True, eq=False, slots=True)
class Cell:
    """A variable that a function closes over."""

    label: str
    cell: types.CellType
    before: Any

    def written(self) -> Iterator[tuple[str, Any]]:
        if content(self.cell) is not self.before:
            yield self.label, content(self.cell)

    def bypass_caches(self) -> None:
        if type(self.before) is CACHED:
            self.cell.cell_contents = uncached(self.before)

    def restore(self) -> None:
        if content(self.cell) is self.before:
            return
        if self.before is EMPTY:
            del self.cell.cell_contents
        else:
            self.cell.cell_contents = self.before


def content(cell: types.CellType) -> Any:
    """What a closure's variable holds; EMPTY before it is assigned."""
    with suppress(ValueError):
        return cell.cell_contents
    return EMPTY


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """One global variable of a Python module."""

    name: str
    module: dict[str, Any]
    before: Any

    def written(self) -> Iterator[tuple[str, Any]]:
        if self.module.get(self.name, EMPTY) is not self.before:
            yield self.name, self.module.get(self.name)

    def bypass_caches(self) -> None:
        if type(self.before) is CACHED:
            self.module[self.name] = uncached(self.before)

    def restore(self) -> None:
        if self.before is EMPTY:
            self.module.pop(self.name, None)
        else:
            self.module[self.name] = self.before


@dataclass(frozen=True, eq=False, slots=True)
class ClassAttributes:
    """The attributes of a class, without the names in double underscores."""

    owner: type
    before: dict[str, Any]

    def written(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self.owner).items():
            if issubclass(type(value), Tensor) and self.before.get(name) is not value:
                yield f"{self.owner.__name__}.{name}", value

    def bypass_caches(self) -> None:
        for name, value in self.before.items():
            other = uncached(value)
            if other is not value:
                setattr(self.owner, name, other)

    def restore(self) -> None:
        for name, value in list(vars(self.owner).items()):
            if name not in self.before and not is_dunder(name):
                delattr(self.owner, name)
            elif name in self.before and value is not self.before[name]:
                setattr(self.owner, name, self.before[name])
        for name in self.before.keys() - vars(self.owner).keys():
            setattr(self.owner, name, self.before[name])


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class _Internal:
    """The base of memories of what no loss reads: nothing written there is a by-product of the pass."""

    __slots__ = ()

    def written(self) -> Iterator[tuple[str, Any]]:
        return iter(())


@dataclass(frozen=True, eq=False, slots=True)
class Cache(_Internal):
    """A function behind `functools.cache`. What it cached in a trace are tensors without data."""

    function: Any
    misses: int

    def restore(self) -> None:
        if self.function.cache_info().misses != self.misses:
            self.function.cache_clear()


@dataclass(frozen=True, eq=False, slots=True)
class Values(_Internal):
    """The numbers in a tensor."""

    tensor: Tensor
    before: Tensor

    def restore(self) -> None:
        if self.tensor.shape != self.before.shape:
            self.tensor.data = self.before
        elif not torch.equal(self.tensor, self.before):
            self.tensor.data.copy_(self.before)


@dataclass(frozen=True, eq=False, slots=True)
class Training(_Internal):
    """Whether a parameter trains, and its gradient."""

    parameter: Tensor
    trains: bool
    grad: Tensor | None

    def restore(self) -> None:
        if self.parameter.requires_grad != self.trains:
            self.parameter.requires_grad_(self.trains)
        if self.parameter.grad is not self.grad:
            self.parameter.grad = self.grad


@dataclass(frozen=True, eq=False, slots=True)
class Generator(_Internal):
    """The state of a generator of random numbers."""

    put_back: Callable[[], None]

    def restore(self) -> None:
        self.put_back()


def generator_of(thing: Any) -> Generator | None:
    """The memory of a generator of Python's, torch's or NumPy's; None for any other object."""
    kind = type(thing)  # not isinstance(), which asks a proxy what it stands for
    if issubclass(kind, random.Random):
        return Generator(partial(thing.setstate, thing.getstate()))
    if issubclass(kind, torch.Generator):
        return Generator(partial(_set_state, thing, thing.get_state()))
    bits = getattr(thing, "bit_generator", None) if kind.__module__.startswith("numpy") else None
    return None if bits is None else Generator(partial(setattr, bits, "state", bits.state))


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)
