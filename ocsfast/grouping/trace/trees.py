"""What user code passes and returns: tensors in tuples, lists, dicts and objects, and the way to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree

Path = tuple[Any, ...]  # keys, as `pytree.keystr` spells them


def leaves_with_paths(tree: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Every leaf of a tree and the keys that lead to it, in the order of `pytree.tree_leaves`.

    Where the class of a node does not tell torch its keys, they are the names of its fields, if it has
    as many, or else numbers.
    """
    entries = _entries(tree)
    if len(entries) == 1 and entries[0][1] is tree:
        return [(path, tree)]
    return [leaf for key, child in entries for leaf in leaves_with_paths(child, (*path, *key))]


def _entries(node: Any) -> list[tuple[Path, Any]]:
    """What one node holds, with the key of each; a leaf holds itself."""

    def inside(child: Any) -> bool:
        return child is not node

    try:
        return pytree.tree_flatten_with_path(node, is_leaf=inside)[0]
    except ValueError:  # "Did not find a flatten_with_keys_fn for type"
        children = pytree.tree_leaves(node, is_leaf=inside)
        names = _names(node)
        keys: list[Any] = [pytree.GetAttrKey(name) for name in names]
        if len(names) != len(children):
            keys = [pytree.SequenceKey(number) for number in range(len(children))]
        return [((key,), child) for key, child in zip(keys, children, strict=True)]


def _names(node: Any) -> list[str]:
    """The names of what a node holds: the keys of a mapping, or the fields that are not None."""
    if isinstance(node, Mapping):
        return [str(key) for key in node]
    if is_dataclass(node):
        return [field.name for field in fields(node) if getattr(node, field.name, None) is not None]
    return []
