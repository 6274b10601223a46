"""The size attributes of modules: integers such as `out_channels` that count a tensor's indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ocsfast.core.errors import StateError
from ocsfast.core.families import Attribute, Families, kept_indices

Size = tuple[nn.Module, str, int]  # a module, the name of its attribute, the value to set

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # "training", "_parameters" ...
PLAIN = (int, str, float, bool, type(None))
LONGEST = 256  # entries: a longer list holds data, no sizes


def size_attributes(module: nn.Module) -> dict[str, int]:
    """The integers of a module that may be sizes, by name.

    The name is "num_heads" for an attribute, "splits[1]" for an entry of a tuple or list, and
    "axes['h']" for one of a dict; they may be nested. Of `normalized_shape` the last entry has the name
    of the whole.
    """
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            with_sizes(name, value, lambda entry, size: found.setdefault(entry, size))
    return found


def with_sizes(name: str, value: Any, new: Callable[[str, int], int]) -> Any:
    """An attribute's value with `new(name, size)` in the place of each integer.

    Anything but integers and containers of plain values is returned as it is.
    """
    if type(value) is int:
        return new(name, value)
    if not _holds_sizes(value):
        return value
    if type(value) is dict:
        return {key: with_sizes(f"{name}[{key!r}]", entry, new) for key, entry in value.items()}
    names = [f"{name}[{k}]" for k in range(len(value))]
    if name == "normalized_shape":
        names[-1] = name
    return type(value)(with_sizes(n, entry, new) for n, entry in zip(names, value, strict=True))


def _holds_sizes(value: Any) -> bool:
    """Whether a value is a tuple, list or dict of plain values, with an integer among them."""
    integers, waiting = 0, [value]
    for container in waiting:  # which grows
        if type(container) not in (tuple, list, dict) or len(container) > LONGEST:
            return False
        for entry in container.values() if type(container) is dict else container:
            if type(entry) not in PLAIN:
                waiting.append(entry)
            integers += type(entry) is int
        if len(waiting) > LONGEST:
            return False
    return integers > 0


def set_size(module: nn.Module, name: str, size: int) -> None:
    """Set the attribute, or the entry of one, that `size_attributes` calls `name`."""
    whole = name.partition("[")[0]
    value = getattr(module, whole)
    setattr(module, whole, with_sizes(whole, value, lambda entry, n: size if entry == name else n))


def kept_sizes(model: nn.Module, families: Families, gone: Tensor) -> list[Size]:
    """The size attributes that a cut sets, each with its new value.

    Args:
        gone: [num_groups] bool, on the CPU.

    Raises:
        StateError: an attribute is not what it was when the model was grouped, or its records disagree.
    """
    values: dict[tuple[str, str], tuple[nn.Module, int]] = {}
    for attribute in families.attributes:
        where = _place_of(attribute)
        module = model.get_submodule(attribute.module)
        now = size_attributes(module).get(attribute.name)
        if now != attribute.groups.numel() and not attribute.read:
            continue  # it had this size by chance, as a counter may
        if now != attribute.groups.numel():
            raise StateError(f"{where} is {now}, but {attribute.groups.numel()} when it was grouped")
        kept = int(kept_indices(attribute.groups, gone).numel())
        key = (attribute.module, attribute.name)
        if values.setdefault(key, (module, kept))[1] != kept:
            raise StateError(f"{where}: its records disagree ({values[key][1]} or {kept} stay)")
    return [(module, name, kept) for (_, name), (module, kept) in values.items()]


def stale_sizes(model: nn.Module, families: Families, pruned: Tensor) -> tuple[str, ...]:
    """The attributes that may count pruned groups but that the cut does not set.

    Returns:
        Each with its value, as in "layers.2.c = 64".
    """
    gone = pruned.detach().cpu()
    stale = []
    for attribute in families.unsure:
        groups = attribute.groups[attribute.groups >= 0]
        value = size_attributes(model.get_submodule(attribute.module)).get(attribute.name)
        if value is not None and bool(gone[groups].any()):
            stale.append(f"{_place_of(attribute)} = {value}")
    return tuple(stale)


def followed_sizes(families: Families, pruned: Tensor) -> tuple[str, ...]:
    """The attributes that the cut sets although no traced code read them.

    Returns:
        Each with its old and new value, as in "1.c: 32 -> 22".
    """
    gone = pruned.detach().cpu()
    found = []
    for attribute in families.attributes:
        kept = kept_indices(attribute.groups, gone).numel()
        if not attribute.read and kept != attribute.groups.numel():
            found.append(f"{_place_of(attribute)}: {attribute.groups.numel()} -> {kept}")
    return tuple(found)


def _place_of(attribute: Attribute) -> str:
    """The attribute's qualified name; the root module has none."""
    return f"{attribute.module}.{attribute.name}".lstrip(".")
