"""The keys that lead to each leaf of a nested value, whatever classes it is nested in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree


def key_paths(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Each leaf with its keys, as `tree_flatten_with_path` gives them.

    That function refuses classes that were registered with torch without names, as the outputs of
    diffusers are. Here a mapping's keys are the names then, and entries of anything else are counted.
    """
    paths = []
    for path, child in _children(tree):
        inside = [((), child)] if child is tree else key_paths(child)
        paths += [((*path, *rest), leaf) for rest, leaf in inside]
    return paths


def _children(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """One step down; a leaf is its own child."""
    try:
        return pytree.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)[0]
    except ValueError:
        children = pytree.tree_leaves(tree, is_leaf=lambda part: part is not tree)
    if isinstance(tree, Mapping):
        return [((pytree.MappingKey(k),), child) for k, child in zip(tree, children, strict=True)]
    return [((pytree.SequenceKey(k),), child) for k, child in enumerate(children)]
