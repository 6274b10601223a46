"""The size attributes of modules: integers such as `out_channels` that count a tensor's indices."""

from __future__ import annotations

from torch import Tensor, nn

from ocsfast.core.errors import StateError
from ocsfast.core.families import Attribute, Families, kept_indices

Size = tuple[nn.Module, str, int]  # a module, the name of its attribute, the value to set


def size_attributes(module: nn.Module) -> dict[str, int]:
    """The integers of a module that may be sizes, by name.

    The name is "num_heads" for an attribute, and "splits[1]" for an entry of a tuple or list. Of
    `normalized_shape` only the last entry is taken, under the name of the whole.
    """
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            found[name] = value
        elif isinstance(value, (tuple, list)) and value and all(type(entry) is int for entry in value):
            if name == "normalized_shape":
                found[name] = value[-1]
            else:
                found.update({f"{name}[{k}]": entry for k, entry in enumerate(value)})
    return found


def set_size(module: nn.Module, name: str, size: int) -> None:
    """Set the attribute, or the entry of one, that `size_attributes` calls `name`."""
    whole, _, place = name.partition("[")
    value = getattr(module, whole)
    if isinstance(value, (tuple, list)):
        entries = list(value)
        entries[int(place[:-1]) if place else -1] = size
        setattr(module, whole, type(value)(entries))
    else:
        setattr(module, whole, size)


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
