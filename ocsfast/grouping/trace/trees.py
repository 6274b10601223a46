"""What user code passes and returns: tensors in tuples, lists, dicts and objects, and the way to each.

torch takes apart the classes that its pytree knows. `teach` tells it of the others that hold tensors:
dataclasses, mappings, and any object with tensors in its attributes. None of their own code runs.
"""

from __future__ import annotations

import types
from collections import deque, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError
from ocsfast.grouping.trace.memory import CONTAINERS, EMPTY, dict_of, entries_of, items_of, own_attribute

Path = tuple[Any, ...]  # keys, as `pytree.keystr` spells them

# Beyond these, an object counts as one without tensors: steps from it, and objects in all.
DEPTH, MOST_OBJECTS = 6, 10_000
PLAIN = (Tensor, int, float, bool, str, type(None))  # leaves that torch.export takes and returns
# Tensors may lie in these where nothing can look for them.
CLOSED = (Iterator, types.FunctionType, types.MethodType, partial, nn.Module)


def leaves_with_paths(tree: Any, *, whole: bool = False) -> list[tuple[Path, Any]]:
    """Every leaf of a tree and the keys that lead to it, in the order of `pytree.tree_leaves`.

    Where the class of a node does not tell torch its keys, they are the names of its fields, if it has
    as many, or else numbers.

    Args:
        tree: anything.
        whole: whether a node that leads back to itself is refused; False: it counts once.

    Raises:
        GroupingError: it is refused.
    """
    found: list[tuple[Path, Any]] = []

    def visit(node: Any, path: Path, above: tuple[Any, ...]) -> None:
        if any(node is other for other in above):
            if whole:
                raise GroupingError(
                    f"a {type(node).__name__} holds itself (at {pytree.keystr(path)}), and its tensors "
                    "cannot be found: pass or return them in a dict, or say in forward= what to run (a "
                    "function of model and inputs)"
                )
            return
        entries = _entries(node)
        if entries is None:
            found.append((path, node))
        for key, child in entries or ():
            visit(child, (*path, key), (*above, node))

    visit(tree, (), ())
    return found


def _entries(node: Any) -> list[tuple[Any, Any]] | None:
    """What a node of a tree holds, with the key of each; None for a leaf."""
    kind: Any = type(node)
    if kind not in pytree.SUPPORTED_NODES and isinstance(node, tuple) and hasattr(kind, "_fields"):
        kind = namedtuple
    known = pytree.SUPPORTED_NODES.get(kind)
    if known is None:
        return None
    if known.flatten_with_keys_fn is not None:
        return list(known.flatten_with_keys_fn(node)[0])
    children, names = known.flatten_fn(node)[0], _names(node)
    keys: list[Any] = [pytree.GetAttrKey(name) for name in names]
    if len(names) != len(children):
        keys = [pytree.SequenceKey(number) for number in range(len(children))]
    return list(zip(keys, children, strict=True))


def _names(node: Any) -> list[str]:
    """The names of what a node holds: the keys of a mapping, or the fields that are not None."""
    if isinstance(node, Mapping):
        return [str(key) for key in node]
    if is_dataclass(node):
        return [field.name for field in fields(node) if getattr(node, field.name, None) is not None]
    return []


def teach(tree: Any) -> None:
    """Let torch's pytree take apart every object in a tree that holds tensors, from now on.

    Raises:
        GroupingError: an object leads back to itself.
    """
    while True:
        leaves = [leaf for _, leaf in leaves_with_paths(tree, whole=True)]
        unknown = {type(leaf) for leaf in leaves if not isinstance(leaf, PLAIN) and _holds_tensors(leaf)}
        if not unknown:
            return
        for kind in unknown:
            _register(kind)


def teach_kinds(spec: pytree.TreeSpec) -> None:
    """Let torch's pytree know the classes in a structure that was made in another process."""
    if isinstance(spec.context, Parts):
        _register(spec.type)
    for child in spec.children():
        teach_kinds(child)


@dataclass(frozen=True)
class Parts:
    """What `teach` tells torch of an object, beside the values in it: the key of each."""

    keys: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)


def _register(kind: type) -> None:
    if kind not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            kind, _flattened, partial(_made, kind), flatten_with_keys_fn=_flattened_with_keys
        )


def _parts(thing: Any) -> list[tuple[Any, Any]]:
    """What an object holds, with the key of each: items or entries, then attributes."""
    kind = type(thing)
    held: list[tuple[Any, Any]] = []
    if issubclass(kind, dict):
        held = [(pytree.MappingKey(key), value) for key, value in entries_of(thing).items()]
    elif issubclass(kind, (list, tuple, deque)):
        held = [(pytree.SequenceKey(number), value) for number, value in enumerate(items_of(thing))]
    slots = ((name, own_attribute(thing, name)) for name in _slots(kind))
    attributes = [*dict_of(thing).items(), *slots]
    return held + [(pytree.GetAttrKey(n), value) for n, value in attributes if value is not EMPTY]


def _slots(kind: type) -> list[str]:
    """The attributes that a class and its bases declare in `__slots__`."""
    found = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _flattened(thing: Any) -> tuple[list[Any], Parts]:
    parts = _parts(thing)
    return [value for _, value in parts], Parts(tuple(key for key, _ in parts))


def _flattened_with_keys(thing: Any) -> tuple[list[tuple[Any, Any]], Parts]:
    parts = _parts(thing)
    return parts, Parts(tuple(key for key, _ in parts))


def _made(kind: type, values: Any, parts: Parts) -> Any:
    """An object of a class that holds these, made without its constructor."""
    held = list(zip(parts, values, strict=True))
    items = [value for key, value in held if isinstance(key, pytree.SequenceKey)]
    base: Any = next((b for b in CONTAINERS if issubclass(kind, b)), object)
    thing: Any = tuple.__new__(kind, items) if base is tuple else _empty(kind)
    if base in (list, deque):
        base.extend(thing, items)
    for key, value in held:
        if isinstance(key, pytree.MappingKey):
            base.__setitem__(thing, key.key, value)
        elif isinstance(key, pytree.GetAttrKey):
            object.__setattr__(thing, key.name, value)
    return thing


def _empty(kind: type) -> Any:
    bases: tuple[Any, ...] = kind.__mro__
    for base in bases:
        try:
            return base.__new__(kind)
        except TypeError:  # it wants arguments, or is not the base that lays out the memory
            continue
    raise GroupingError(f"no empty {kind.__name__} can be made: return or pass its tensors in a dict")


def _holds_tensors(thing: Any, seen: set[int] | None = None, depth: int = 0) -> bool:
    """Whether a tensor is within reach of an object's items and attributes."""
    seen = set() if seen is None else seen
    if issubclass(type(thing), Tensor):
        return True
    known = isinstance(thing, (*PLAIN, *CLOSED, type, types.ModuleType)) or id(thing) in seen
    if known or depth > DEPTH or len(seen) > MOST_OBJECTS:
        return False
    seen.add(id(thing))
    return any(_holds_tensors(value, seen, depth + 1) for _, value in _parts(thing))


class Opaque:
    """An input that holds no tensor and that torch.export would refuse: an array, a path, an image."""

    def __init__(self, value: Any) -> None:
        self.value = value


def hidden(inputs: Any) -> Any:
    """The same inputs, each leaf that torch.export would refuse in an `Opaque`, which has no leaf."""
    return pytree.tree_map(lambda x: x if isinstance(x, PLAIN) else Opaque(x), inputs)


def shown(inputs: Any) -> Any:
    """The inputs that `hidden` was given."""

    def is_opaque(x: Any) -> bool:
        return isinstance(x, Opaque)

    return pytree.tree_map(lambda x: x.value if is_opaque(x) else x, inputs, is_leaf=is_opaque)


def _same(opaque: Opaque) -> tuple[list[Any], Opaque]:
    return [], opaque


pytree.register_pytree_node(
    Opaque, _same, lambda _, opaque: opaque, flatten_with_keys_fn=lambda opaque: ([], opaque)
)


def without_strangers(output: Any, *, whole: bool = False) -> Any:
    """The same output, with None for every leaf that torch.export could not return.

    Args:
        output: what the model returned, once `teach` has seen it.
        whole: whether such a leaf is refused.

    Raises:
        GroupingError: it is refused, or tensors may lie in it unseen.
    """

    def known(leaf: Any) -> Any:
        if isinstance(leaf, PLAIN):
            return leaf
        holds = isinstance(leaf, (set, frozenset)) and any(isinstance(x, Tensor) for x in leaf)
        if whole or holds or isinstance(leaf, CLOSED):
            raise GroupingError(
                f"the model returns a {type(leaf).__name__}, which a graph cannot: return tensors, or "
                "say in forward= what to run (a function of model and inputs that returns tensors)"
            )
        return None

    return pytree.tree_map(known, output)
