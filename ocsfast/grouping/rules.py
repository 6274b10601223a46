"""Rules of operators without weights: element by element, moving indices about, reductions."""

from __future__ import annotations

from typing import Any

import torch

from ocsfast.grouping.labels import Dims, Vector
from ocsfast.grouping.propagate import Node, Value, Walk, freeze, operator_name, rule, shape

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
    *("dropout", "feature_dropout", "alpha_dropout", "identity", "_conj", "requires_grad"),
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


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")
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
    elif name == "unflatten":  # (dim, sizes)
        first = args["dim"] % len(shape(source))
        for place in range(len(args["sizes"])):
            walk.sized(node, 1 + place, dims[first + place], new[first + place])
    return dims


@rule("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "numpy_T", "mT")
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
    dims[dim] = taken(dims[dim], first, stop, step)
    return tuple(dims)


@rule("split", "split_with_sizes", "chunk", "tensor_split")
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
    walk.labels.freeze(dims.pop(args["dim"]), walk.reason(node))
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
    """Copies along a dimension stay: their number stands in the module's code."""
    source, out = shape(node.args[0]), shape(node)
    dims = walk.dims(node.args[0])
    kept: list[Vector | None] = [None] * (len(out) - len(source))
    for vector, old, new in zip(dims, source, out[len(kept) :], strict=True):
        if old != new:
            walk.labels.freeze(vector, walk.reason(node))
        kept.append(vector if old == new else None)
    return tuple(kept)


# -- over whole dimensions ----------------------------------------------------------------------


def reduced_dims(args: dict[str, Any], ndim: int) -> list[int]:
    """The dimensions that an operator's `dim` argument names; all of them where it names none."""
    given = args.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return sorted({d % ndim for d in ([given] if isinstance(given, int) else given)})


def _reduced(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """What is left of the labels when the reduced dimensions are gone."""
    dims = walk.dims(node.args[0])
    reduced = reduced_dims(args, len(dims))
    if args.get("keepdim"):
        out = tuple(None if d in reduced else v for d, v in enumerate(dims))
    else:
        out = tuple(v for d, v in enumerate(dims) if d not in reduced)
    value = node.meta["val"]
    return [out] * len(value) if isinstance(value, (list, tuple)) else out


@rule("sum", "linalg_vector_norm", "norm")
def contract(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Zeros add nothing: a reduced dimension may lose indices."""
    return _reduced(walk, node, args)


@rule("mean", "var", "std", "var_mean", "std_mean")
def average(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A reduced dimension may lose indices, and the average is then over those that are left."""
    dims = walk.dims(node.args[0])
    for d in reduced_dims(args, len(dims)):
        walk.statistic(node, d, dims[d])
        walk.kind("width", dims[d])
    return _reduced(walk, node, args)


@rule(
    "amax", "amin", "max", "min", "logsumexp", "argmax", "argmin", "any", "all", "prod", "topk", "sort"
)
def reduce(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A reduced dimension keeps all its indices; the others pass."""
    dims = walk.dims(node.args[0])
    freeze(walk, tuple(dims[d] for d in reduced_dims(args, len(dims))), walk.reason(node))
    if "dim" in args and operator_name(node.target) not in ("topk", "sort"):
        return _reduced(walk, node, args)
    value = node.meta["val"]
    return [dims] * len(value) if isinstance(value, (list, tuple)) else None


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum")
def along(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    dims = walk.dims(node.args[0])
    walk.labels.freeze(dims[args["dim"]], walk.reason(node))
    return dims


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)
def spatial(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Batch and channels pass, spatial dimensions keep all their indices."""
    dims = walk.dims(node.args[0])
    freeze(walk, dims[2:], walk.reason(node))
    out = (*dims[:2], *[None] * (len(dims) - 2))
    value = node.meta["val"]
    return [out] * len(value) if isinstance(value, (list, tuple)) else out


@rule("pad", "constant_pad_nd")
def pad(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Amounts come in pairs from the last dimension backwards; a padded dimension is frozen."""
    dims = list(walk.dims(node.args[0]))
    amounts = args["pad"]
    for k in range(len(amounts) // 2):
        if amounts[2 * k] or amounts[2 * k + 1]:
            walk.labels.freeze(dims[-1 - k], walk.reason(node))
            dims[-1 - k] = None
    return tuple(dims)
