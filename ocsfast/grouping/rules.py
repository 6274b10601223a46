"""What each operator says about labels. One function a kind of operator; see `labels.py`.

A rule gets the walk (for labels and costs), the node and its arguments by name, and returns the
labels of the result. An operator that is not here freezes what flows in: dense, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ocsfast.grouping.labels import Dims, Vector
from ocsfast.grouping.propagate import Value, Walk, shape

Node = torch.fx.Node
Rule = Callable[[Walk, Node, dict[str, Any]], Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


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
    return reshape_dims(walk, walk.dims(source), shape(source), shape(node), walk.reason(node))


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
    return parts


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


# -- sums of products ---------------------------------------------------------------------------


@rule("linear", "addmm")
def linear(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """y[..., o] = sum_i x[..., i] w[o, i] + b[o]; addmm holds the weight the other way round."""
    if "weight" in args:
        x, weight, bias, out_axis = args["input"], args["weight"], args["bias"], 0
    else:
        x, weight, bias, out_axis = args["mat1"], args["mat2"], args["self"], 1
    x_dims, w_dims, why = walk.dims(x), walk.dims(weight), walk.reason(node)
    walk.labels.unify(x_dims[-1], w_dims[1 - out_axis], why)
    out = w_dims[out_axis]
    if bias is not None:
        walk.labels.unify(out, walk.dims(bias)[-1], why)
    walk.produces(weight, out_axis)
    walk.attribute(node, weight, "in_features", x_dims[-1])
    walk.attribute(node, weight, "out_features", out)
    *leading, _ = shape(x)
    outer, inner = shape(weight)[out_axis], shape(weight)[1 - out_axis]
    walk.product(node, 1, (*x_dims[:-1], out, w_dims[1 - out_axis]), (*leading, outer, inner))
    return (*x_dims[:-1], out)


@rule("matmul", "mm", "bmm")
def matmul(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Batched [..., m, k] @ [..., k, n]; vectors are frozen along k."""
    left, right = node.args[0], node.args[1]
    a, b, why = walk.dims(left), walk.dims(right), walk.reason(node)
    if len(a) < 2 or len(b) < 2:
        for vector in (*a, *b):
            walk.labels.freeze(vector, why)
        return None
    walk.labels.unify(a[-1], b[-2], why)
    batch: list[Vector | None] = []
    out_shape = shape(node)
    for back in range(-len(out_shape), -2):
        full: list[Vector | None] = []
        for dims, own in ((a, shape(left)), (b, shape(right))):
            if len(own) < -back:
                continue
            if own[back] == out_shape[back]:
                full.append(dims[back])
            else:
                walk.labels.freeze(dims[back], why)
        if len(full) == 2:
            walk.labels.unify(full[0], full[1], why)
        batch.append(full[0] if full else None)
    walk.product(node, 1, (*batch, a[-2], b[-1], a[-1]), (*out_shape, shape(left)[-1]))
    return (*batch, a[-2], b[-1])


@rule("einsum")
def einsum(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Same letter, same label. A letter of one operand alone that is summed away is frozen."""
    why, operands = walk.reason(node), list(args["tensors"])
    equation = args["equation"].replace(" ", "")
    inputs, _, result = equation.partition("->")
    terms = inputs.split(",")
    if "." in equation or "->" not in equation or any(len(set(t)) != len(t) for t in terms):
        for operand in operands:
            walk.freeze_all(operand, why)
        return None
    vectors: dict[str, Vector | None] = {}
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, vector, size in zip(term, walk.dims(operand), shape(operand), strict=True):
            if letter in vectors:
                walk.labels.unify(vectors[letter], vector, why)
            vectors.setdefault(letter, vector)
            sizes[letter] = size
    for letter, vector in vectors.items():
        if letter not in result and sum(letter in term for term in terms) == 1:
            walk.labels.freeze(vector, why)
    if len(operands) > 1:
        walk.product(node, 1, tuple(vectors.values()), tuple(sizes.values()))
    return tuple(vectors[letter] for letter in result)


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """weight [out, in / groups, *kernel]. Depthwise is the case groups = in."""
    if args.get("transposed"):
        return conv_transposed(walk, node, args)
    x, weight, bias, groups = args["input"], args["weight"], args["bias"], args["groups"]
    x_dims, w_dims, why = walk.dims(x), walk.dims(weight), walk.reason(node)
    channel = len(x_dims) - (len(w_dims) - 1)  # 1, or 0 for a sample without a batch dimension
    _freeze(walk, (*x_dims[channel + 1 :], *w_dims[2:]), why)
    channels, out = x_dims[channel], w_dims[0]
    if groups == 1:
        walk.labels.unify(channels, w_dims[1], why)
    else:
        _, per_group = _grouped(walk, node, weight, channels, out, shape(weight)[0], groups)
        walk.labels.unify(per_group, w_dims[1], why)
    if bias is not None:
        walk.labels.unify(out, walk.dims(bias)[0], why)
    walk.produces(weight, 0)
    walk.attribute(node, weight, "in_channels", channels)
    walk.attribute(node, weight, "out_channels", out)
    positions = math.prod(shape(node)) // shape(weight)[0]
    kernel = math.prod(shape(weight)[2:])
    walk.product(node, positions * kernel, (out, w_dims[1]), shape(weight)[:2])
    return (*x_dims[:channel], out, *[None] * (len(w_dims) - 2))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transposed(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """weight [in, out / groups, *kernel]."""
    x, weight, bias, groups = args["input"], args["weight"], args["bias"], args["groups"]
    x_dims, w_dims, why = walk.dims(x), walk.dims(weight), walk.reason(node)
    channel = len(x_dims) - (len(w_dims) - 1)
    _freeze(walk, (*x_dims[channel + 1 :], *w_dims[2:]), why)
    channels, out = x_dims[channel], w_dims[1]
    walk.labels.unify(channels, w_dims[0], why)
    if groups > 1:
        outer, _ = _grouped(walk, node, weight, channels, None, shape(weight)[0], groups)
        out = walk.labels.merge([outer, out], [groups, shape(weight)[1]])
    if bias is not None:
        walk.labels.unify(out, walk.dims(bias)[0], why)
    walk.produces(weight, 1)
    walk.attribute(node, weight, "in_channels", channels)
    walk.attribute(node, weight, "out_channels", out)
    positions = math.prod(shape(x)) // shape(weight)[0]
    kernel = math.prod(shape(weight)[2:])
    walk.product(node, positions * kernel, (channels, w_dims[1]), shape(weight)[:2])
    return (*x_dims[:channel], out, *[None] * (len(w_dims) - 2))


def _grouped(
    walk: Walk,
    node: Node,
    weight: Any,
    channels: Vector | None,
    rows: Vector | None,
    num_rows: int,
    groups: int,
) -> tuple[Vector | None, Vector | None]:
    """Input channels and weight rows as (group, rest), the groups the same; both parts of the input."""
    why = walk.reason(node)
    num_channels = channels.size if channels is not None else groups
    outer, rest = walk.labels.split(channels, [groups, num_channels // groups], why)
    if rows is not None or channels is None:
        row_outer, _ = walk.labels.split(rows, [groups, num_rows // groups], why)
        if row_outer is not None or outer is not None:
            walk.labels.unify(outer, row_outer, why)
    walk.attribute(node, weight, "groups", outer)
    return outer, rest


def _freeze(walk: Walk, vectors: Dims, why: str) -> None:
    for vector in vectors:
        walk.labels.freeze(vector, why)


# -- norms --------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
def batch_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    dims, why = walk.dims(node.args[0]), walk.reason(node)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if args.get(name) is not None:
            walk.labels.unify(dims[1], walk.dims(args[name])[0], why)
    walk.attribute(node, args.get("weight"), "num_features", dims[1])
    return dims


@rule("layer_norm", "rms_norm")
def layer_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Its mean and variance run over the indices that are left: the proof knows (see proof.py)."""
    dims, why = walk.dims(args["input"]), walk.reason(node)
    normalized = len(args["normalized_shape"])
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            for own, vector in zip(walk.dims(args[name]), dims[-normalized:], strict=True):
                walk.labels.unify(vector, own, why)
    if normalized > 1:
        _freeze(walk, dims[-normalized:-1], why)
    walk.attribute(node, args.get("weight"), "normalized_shape", dims[-1])
    return dims


@rule("group_norm")
def group_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Whole groups may go (each has a mean of its own), or channels where there is one group."""
    dims, groups, why = walk.dims(args["input"]), args["num_groups"], walk.reason(node)
    channels = shape(args["input"])[1]
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            walk.labels.unify(dims[1], walk.dims(args[name])[0], why)
    if groups > 1:
        outer, inner = walk.labels.split(dims[1], [groups, channels // groups], why)
        walk.labels.freeze(inner, why)
        walk.attribute(node, args.get("weight"), "num_groups", outer)
    walk.attribute(node, args.get("weight"), "num_channels", dims[1])
    return dims


# -- over whole dimensions ----------------------------------------------------------------------


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "logsumexp", "linalg_vector_norm", "norm"
)
def reduce(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A reduced dimension keeps all its indices; the others pass."""
    source, dims = shape(node.args[0]), walk.dims(node.args[0])
    given = args.get("dim")
    if given is None or given == []:
        reduced = set(range(len(source)))
    else:
        reduced = {d % len(source) for d in ([given] if isinstance(given, int) else given)}
    _freeze(walk, tuple(dims[d] for d in reduced), walk.reason(node))
    if args.get("keepdim"):
        out = tuple(None if d in reduced else v for d, v in enumerate(dims))
    else:
        out = tuple(v for d, v in enumerate(dims) if d not in reduced)
    value = node.meta["val"]
    return [out] * len(value) if isinstance(value, (list, tuple)) else out


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
    _freeze(walk, dims[2:], walk.reason(node))
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


@rule("embedding")
def embedding(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Rows are picked by number and stay; the embedded dimension is what the layer produces."""
    rows, width = walk.dims(args["weight"])
    walk.labels.freeze(rows, walk.reason(node))
    walk.produces(args["weight"], 1)
    walk.attribute(node, args["weight"], "embedding_dim", width)
    return (*[None] * len(shape(args["indices"])), width)
