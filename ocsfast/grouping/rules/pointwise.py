"""Rules of operators without weights: element by element, moving indices about."""

from __future__ import annotations

from typing import Any

import torch

from ocsfast.grouping.labels import Dims, Vector
from ocsfast.grouping.propagate import Node, Value, Walk, operator_name, rule, shape
from ocsfast.grouping.shapes import whose_size
from ocsfast.grouping.trace.origins import origins_of

# -- element by element -------------------------------------------------------------------------


@rule("pointwise", "where", "masked_fill")
def pointwise(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Aligned from the right, dimension by dimension: equal sizes mean equal labels."""
    out_shape = shape(node)
    operands = [n for n in node.all_input_nodes if shape(n)]
    out: list[Vector | None] = []
    for back in range(-len(out_shape), 0):
        full: list[Vector | None] = []
        for operand in operands:
            if len(shape(operand)) < -back:
                continue
            vector = walk.dims(operand)[back]
            if shape(operand)[back] == out_shape[back]:
                full.append(vector)
            else:  # one index spread over many cannot go with any single one of them
                walk.labels.freeze(vector, walk.reason(node))
        for other in full[1:]:
            walk.labels.unify(full[0], other, walk.reason(node))
        out.append(full[0] if full else None)
    return tuple(out)


@rule(
    *("clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy"),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
    *(
        "identity",
        "_conj",
        "conj",
        "real",
        "imag",
        "requires_grad",
        "_to_cpu",
        "positive",
        "fill",
        "zero",
    ),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("bernoulli", "normal", "uniform", "exponential"),
    # Activations that torch does not tag as pointwise.
    *("hardswish", "hardsigmoid", "hardtanh", "relu6", "log_sigmoid", "rrelu", "rrelu_with_noise"),
    *("selu", "celu", "threshold", "softshrink", "hardshrink"),
)
def same(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    return walk.dims(node.args[0])


# -- moving indices about -----------------------------------------------------------------------


def reshape_dims(walk: Walk, dims: Dims, old: tuple[int, ...], new: tuple[int, ...], why: str) -> Dims:
    """Group both shapes into blocks of equal product; merge each old block, split it anew."""
    out: list[Vector | None] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        left, right = 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        block_old, block_new = list(dims[first_i:i]), list(new[first_j:j])
        merged = walk.labels.merge(block_old, list(old[first_i:i]))
        if block_new:
            out.extend(walk.labels.split(merged, block_new, why))
        else:  # a trailing dimension of size 1 that disappears
            walk.labels.freeze(merged, why)
    return tuple(out)


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
@rule("view_as", "reshape_as", "_reshape_alias", "ravel")
def reshape(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    source = node.args[0]
    if 0 in shape(source):
        walk.freeze_all(node.all_input_nodes[0], walk.reason(node))
        return None
    new, name = shape(node), operator_name(node.target)
    dims = reshape_dims(walk, walk.dims(source), shape(source), new, walk.reason(node))
    if name in ("view", "reshape"):
        for place, size in enumerate(new):
            walk.sized(node, place, dims[place], size)
            _as_large_as(walk, node, place, dims[place])
    elif name == "unflatten":  # (dim, sizes)
        first = args["dim"] % len(shape(source))
        for place in range(len(args["sizes"])):
            walk.sized(node, 1 + place, dims[first + place], new[first + place])
    return dims


def labels_of_size(walk: Walk, node: Node, place: int, size: int) -> Vector | None:
    """Where the code asked for another tensor's size: the labels that it has there."""
    known = whose_size(node, place)
    if known is None:
        return None
    other, dim = known
    fits = other in walk.values and dim < len(shape(other)) and shape(other)[dim] == size
    return walk.dims(other)[dim] if fits else None


def _as_large_as(walk: Walk, node: Node, place: int, vector: Vector | None) -> None:
    """Where the code asked for another tensor's size, the two shrink together."""
    known = whose_size(node, place)
    if known is not None and known[0] in walk.values:
        size = shape(node)[place]
        walk.labels.unify(vector, labels_of_size(walk, node, place, size), walk.reason(node))


@rule("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "numpy_T", "mT")
@rule("adjoint", "mH", "matrix_H")
def permute(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Found by doing it: permute a tensor whose sizes tell its dimensions apart."""
    dims = walk.dims(node.args[0])
    target: Any = node.target
    probe = torch.empty(tuple(range(2, 2 + len(dims))), device="meta")
    moved = target(probe, *node.args[1:], **node.kwargs)
    return tuple(dims[size - 2] for size in moved.shape)


def taken(vector: Vector | None, first: int, stop: int, step: int = 1) -> Vector | None:
    return None if vector is None else vector[first:stop:step]


@rule("slice", "narrow")
def slice_(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    dims, dim = list(walk.dims(node.args[0])), args["dim"]
    size = shape(node.args[0])[dim]
    if "length" in args:
        first = args["start"]
        first, stop, step = first, first + args["length"], 1
    else:
        first, stop, step = slice(args["start"], args["end"], args["step"]).indices(size)
    whole = dims[dim]
    dims[dim] = taken(whole, first, stop, step)
    if whole is not None and step == 1:
        walk.counted(node, whole[:stop], stop)
        if first > 0:
            walk.counted(node, whole[:first], first)
        if "length" in args:
            walk.counted(node, dims[dim], stop - first)
    return tuple(dims)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    dims, dim = walk.dims(node.args[0]), args["dim"]
    parts, first = [], 0
    for part in node.meta["val"]:
        size = part.shape[dim]
        own = list(dims)
        own[dim] = taken(own[dim], first, first + size)
        parts.append(tuple(own))
        first += size
    _split_alike(walk, node, [part[dim] for part in parts])
    return parts


def _split_alike(walk: Walk, node: Node, vectors: list[Vector | None]) -> None:
    """Python code splits into equal parts, or by sizes of its own: both bind the parts' widths."""
    name, sizes = operator_name(node.target), [0 if v is None else v.size for v in vectors]
    for k, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        if name != "chunk":
            walk.sized(node, k if name == "split_with_sizes" else 0, vector, size)
        if name != "split_with_sizes" and size == sizes[0]:
            walk.labels.unify(vectors[0], vector, walk.reason(node))


@rule("select", "unbind")
def select(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A position picked by number has to stay where it is: nothing before it may go."""
    dims = list(walk.dims(node.args[0]))
    picked = dims.pop(args["dim"])
    if node.users:  # else it is there for its shape alone
        walk.labels.freeze(picked, walk.reason(node))
    if isinstance(node.meta["val"], (list, tuple)):
        return [tuple(dims) for _ in node.meta["val"]]
    return tuple(dims)


@rule("flip")
def flip(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    dims = list(walk.dims(node.args[0]))
    for dim in args["dims"]:
        vector = dims[dim]
        dims[dim] = None if vector is None else vector[::-1].copy()
    return tuple(dims)


@rule("cat", "concat", "concatenate")
def cat(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    operands = [n for n in args["tensors"] if shape(n) != (0,)]
    dim = args["dim"] % len(shape(node))
    columns = list(zip(*(walk.dims(n) for n in operands), strict=True))
    out: list[Vector | None] = []
    for d, column in enumerate(columns):
        if d == dim:
            sizes = [shape(n)[d] for n in operands]
            parts = [v if v is not None else _frozen(s) for v, s in zip(column, sizes, strict=True)]
            joined = torch.cat([torch.from_numpy(part) for part in parts]).numpy()
            out.append(joined)
        else:
            for other in column[1:]:
                walk.labels.unify(column[0], other, walk.reason(node))
            out.append(column[0])
    return tuple(out)


def _frozen(size: int) -> Vector:
    return torch.zeros(size, dtype=torch.int64).numpy()


@rule("stack")
def stack(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    first, *others = [walk.dims(n) for n in args["tensors"]]
    for other in others:
        for a, b in zip(first, other, strict=True):
            walk.labels.unify(a, b, walk.reason(node))
    dims = list(first)
    dims.insert(args["dim"] % len(shape(node)), None)
    return tuple(dims)


@rule("expand", "expand_as")
def expand(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Copies along a dimension stay where their number stands in the module's code."""
    source, out = shape(node.args[0]), shape(node)
    dims = walk.dims(node.args[0])
    if "other" in args:  # their number follows the other tensor
        return _expanded_as(walk, node, args["other"])
    lead = len(out) - len(source)
    kept = [copies(walk, node, place, size) for place, size in enumerate(out)]
    for d, (vector, old, new) in enumerate(zip(dims, source, out[lead:], strict=True)):
        if old == new:
            kept[lead + d] = vector
            walk.sized(node, lead + d, vector, new)
        else:
            walk.labels.freeze(vector, walk.reason(node))
    return tuple(kept)


def copies(walk: Walk, node: Node, place: int, size: int) -> Vector | None:
    """The labels of the copies along a dimension; none where the tensor has labels of its own.

    A key that several queries share would else have two owners.
    """
    if any(walk.labels.live(vector) for vector in walk.dims(node.args[0])):
        return labels_of_size(walk, node, place, size)
    return asked_for(walk, node, place, size)


def asked_for(walk: Walk, node: Node, place: int, size: int) -> Vector | None:
    """The labels of a dimension whose size the code says and whose indices are all alike.

    Their number may be a module's attribute, or a size of another tensor, and then shrinks with it.
    """
    origin = origins_of(node).get(place)
    if origin is None or origin[2] != size or size <= 1:
        return labels_of_size(walk, node, place, size)
    vector = walk.labels.fresh(size)
    walk.sized(node, place, vector, size)
    return vector


def _expanded_as(walk: Walk, node: Node, other: Any) -> Value:
    dims, source = walk.dims(node.args[0]), shape(node.args[0])
    out = list(walk.dims(other))
    for back in range(-len(source), 0):
        if source[back] == shape(other)[back]:
            out[back] = dims[back]
            walk.labels.unify(dims[back], walk.dims(other)[back], walk.reason(node))
    return tuple(out)


@rule("glu")
def glu(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """One half gates the other, index by index."""
    dims = list(walk.dims(node.args[0]))
    vector = dims[args["dim"]]
    if vector is not None:
        first, second = vector[: vector.size // 2], vector[vector.size // 2 :]
        walk.labels.unify(first, second, walk.reason(node))
        dims[args["dim"]] = first
    return tuple(dims)


@rule("prelu")
def prelu(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A slope a channel, or one for all."""
    dims, (slope,) = walk.dims(node.args[0]), walk.dims(args["weight"])
    if shape(args["weight"])[0] > 1:
        walk.labels.unify(dims[1], slope, walk.reason(node))
        walk.attribute(node, args["weight"], "num_parameters", slope)
    return dims
