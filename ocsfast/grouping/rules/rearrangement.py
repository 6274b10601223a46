"""Rules of operators that move indices about, take some of them, or join tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ocsfast.grouping.labels import Dims, Vector
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.rules.sizes import tie_to_size
from ocsfast.grouping.trace.nodes import Node, operator_name, shape
from ocsfast.grouping.walk import Value, Walk


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
@rule("view_as", "reshape_as", "_reshape_alias", "ravel")
def reshape(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Any change of shape that keeps the order of the elements.

    A size in the call may be a module's attribute or another tensor's size, which must then follow.
    """
    source = node.args[0]
    if 0 in shape(source):
        walk.freeze_all(node.all_input_nodes[0], walk.reason(node))
        return None
    new, name = shape(node), operator_name(node.target)
    dims = reshape_dims(walk, walk.dims(source), shape(source), new, walk.reason(node))
    if name in ("view", "reshape"):
        for place, size in enumerate(new):
            walk.sized(node, place, dims[place], size)
            tie_to_size(walk, node, place, dims[place])
    elif name == "unflatten":  # (dim, sizes)
        first = args["dim"] % len(shape(source))
        for place in range(len(args["sizes"])):
            walk.sized(node, 1 + place, dims[first + place], new[first + place])
    return dims


def reshape_dims(walk: Walk, dims: Dims, old: tuple[int, ...], new: tuple[int, ...], why: str) -> Dims:
    """The labels after a reshape from `old` to `new`.

    Both shapes are grouped, from the left, into blocks of equal product. The dimensions of each old
    block are merged into one, which is split into the dimensions of the new block.
    """
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
        else:  # dimensions of size 1 at the end, which disappear
            walk.labels.freeze(merged, why)
    return tuple(out)


@rule("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "numpy_T", "mT")
@rule("adjoint", "mH", "matrix_H")
def permute(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The operator itself says where dimensions go: it permutes a tensor of sizes 2, 3, 4 ..."""
    dims = walk.dims(node.args[0])
    target: Any = node.target
    probe = torch.empty(tuple(range(2, 2 + len(dims))), device="meta")
    moved = target(probe, *node.args[1:], **node.kwargs)
    return tuple(dims[size - 2] for size in moved.shape)


@rule("slice", "narrow")
def slice_(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A part of one dimension. An attribute that bounds it counts the indices up to there."""
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
        walk.sized(node, (dim, "stop"), whole[:stop], stop)
        walk.counted(node, whole[:stop], stop)
        if first > 0:
            walk.sized(node, (dim, "start"), whole[:first], first)
            walk.counted(node, whole[:first], first)
        if "length" in args:
            walk.counted(node, dims[dim], stop - first)
    return tuple(dims)


def taken(vector: Vector | None, first: int, stop: int, step: int = 1) -> Vector | None:
    """A part of a label vector."""
    return None if vector is None else vector[first:stop:step]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
@rule("unsafe_split_with_sizes")
def split(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Consecutive parts of one dimension."""
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
    """After a cut the code splits as before, so the widths of the parts are bound.

    `chunk` and `split` make equal parts, whose indices therefore go together; `split_with_sizes` takes a
    size for each part, which may be an attribute.
    """
    name, sizes = operator_name(node.target), [0 if v is None else v.size for v in vectors]
    for k, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        if "chunk" not in name:
            walk.sized(node, k if "with_sizes" in name else 0, vector, size)
        if "with_sizes" not in name and size == sizes[0]:
            walk.labels.unify(vectors[0], vector, walk.reason(node))


@rule("select", "unbind")
def select(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A position that the code picks by number must keep it, so no index of the dimension may go."""
    dims = list(walk.dims(node.args[0]))
    picked = dims.pop(args["dim"])
    if node.users:  # without users the code only asked for its shape
        walk.labels.freeze(picked, walk.reason(node))
    if isinstance(node.meta["val"], (list, tuple)):
        return [tuple(dims) for _ in node.meta["val"]]
    return tuple(dims)


@rule("diagonal")
def diagonal(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """[.., n, .., n, ..] -> [.., n]: entry k has index k of both dimensions. Others are frozen."""
    source = node.args[0]
    dims, sizes, why = list(walk.dims(source)), shape(source), walk.reason(node)
    first, second = sorted(d % len(dims) for d in (args["dim1"], args["dim2"]))
    b, a = dims.pop(second), dims.pop(first)
    if args["offset"] or sizes[first] != sizes[second]:
        walk.freeze((a, b), why)
        return (*dims, None)
    walk.labels.unify(a, b, why)
    return (*dims, a)


@rule("diag_embed")
def diag_embed(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """[.., n] -> [.., n, n] with zeros beside the diagonal: index k of both dimensions goes with k."""
    *dims, vector = walk.dims(node.args[0])
    if args["offset"]:
        walk.labels.freeze(vector, walk.reason(node))
        vector = None
    rank = len(shape(node))
    for d in sorted(d % rank for d in (args["dim1"], args["dim2"])):
        dims.insert(d, vector)
    return tuple(dims)


@rule("flip")
def flip(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Index k of a flipped dimension comes to stand k-th from the end."""
    dims = list(walk.dims(node.args[0]))
    for dim in args["dims"]:
        vector = dims[dim]
        dims[dim] = None if vector is None else vector[::-1].copy()
    return tuple(dims)


@rule("cat", "concat", "concatenate")
def cat(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Along `dim` the label vectors follow each other; other dimensions have equal labels."""
    operands = [n for n in args["tensors"] if shape(n) != (0,)]
    dim = args["dim"] % len(shape(node))
    columns = list(zip(*(walk.dims(n) for n in operands), strict=True))
    out: list[Vector | None] = []
    for d, column in enumerate(columns):
        if d == dim:
            sizes = [shape(n)[d] for n in operands]
            parts = [v if v is not None else _frozen(s) for v, s in zip(column, sizes, strict=True)]
            joined = np.concatenate(parts)
            out.append(joined)
        else:
            for other in column[1:]:
                walk.labels.unify(column[0], other, walk.reason(node))
            out.append(column[0])
    return tuple(out)


def _frozen(size: int) -> Vector:
    """A vector of the empty term, which stands for a dimension without labels."""
    return np.zeros(size, dtype=np.int64)


@rule("stack")
def stack(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Tensors of one shape have equal labels; their number stands in the code, so all stay."""
    first, *others = [walk.dims(n) for n in args["tensors"]]
    for other in others:
        for a, b in zip(first, other, strict=True):
            walk.labels.unify(a, b, walk.reason(node))
    dims = list(first)
    dims.insert(args["dim"] % len(shape(node)), None)
    return tuple(dims)
