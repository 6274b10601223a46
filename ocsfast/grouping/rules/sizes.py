"""Sizes that the model's code passes to an operator, and what they tie the result to."""

from __future__ import annotations

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.trace.origins import origins_of
from ocsfast.grouping.trace.shapes import whose_size
from ocsfast.grouping.walk import Walk


def labels_of_size(walk: Walk, node: Node, place: int, size: int) -> Vector | None:
    """The labels of the dimension whose size stands at this place of the call.

    None where the code read that size off no tensor, or where `size` is another.
    """
    known = whose_size(node, place)
    if known is None:
        return None
    other, dim = known
    fits = other in walk.values and dim < len(shape(other)) and shape(other)[dim] == size
    return walk.dims(other)[dim] if fits else None


def tie_to_size(walk: Walk, node: Node, place: int, vector: Vector | None) -> None:
    """If the size at this place was read off another tensor, the two dimensions shrink together."""
    known = whose_size(node, place)
    if known is not None and known[0] in walk.values:
        size = shape(node)[place]
        walk.labels.unify(vector, labels_of_size(walk, node, place, size), walk.reason(node))


def asked_for(walk: Walk, node: Node, place: int, size: int) -> Vector | None:
    """The labels of a new dimension whose indices are all alike, and whose size the code passes.

    Where the size is a module's attribute, the dimension gets fresh atoms and shrinks with the
    attribute. Where it was read off another tensor, it has that dimension's labels.
    """
    origin = origins_of(node).get(place)
    if origin is None or origin[2] != size or size <= 1:
        return labels_of_size(walk, node, place, size)
    vector = walk.labels.fresh(size)
    walk.sized(node, place, vector, size)
    return vector


def copies(walk: Walk, node: Node, place: int, size: int) -> Vector | None:
    """The labels of the copies that an operator makes along a new dimension, or one of size 1.

    As `asked_for`, but without fresh atoms if the tensor itself has live labels: an index of a copy
    would then belong to two groups, as a key that several queries share does.
    """
    if any(walk.labels.live(vector) for vector in walk.dims(node.args[0])):
        return labels_of_size(walk, node, place, size)
    return asked_for(walk, node, place, size)
