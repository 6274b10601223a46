"""Rules of operators with weights, which also state what they cost: products, convolutions, norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.propagate import Node, Value, Walk, freeze, rule, shape

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
    for vector in batch:
        walk.kind("head", vector)
    if any(walk.labels.live(vector) for vector in batch):
        walk.kind("head_dim", a[-1])
        walk.kind("head_dim", b[-1])
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
    freeze(walk, (*x_dims[channel + 1 :], *w_dims[2:]), why)
    channels, out = x_dims[channel], w_dims[0]
    if groups == 1:
        walk.labels.unify(channels, w_dims[1], why)
    else:
        _, per_group = _grouped(walk, node, weight, channels, out, shape(weight)[0], groups)
        walk.labels.unify(per_group, w_dims[1], why)
    if bias is not None:
        walk.labels.unify(out, walk.dims(bias)[0], why)
    walk.produces(weight, 0)
    walk.kind("channel", out)
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
    freeze(walk, (*x_dims[channel + 1 :], *w_dims[2:]), why)
    channels, out = x_dims[channel], w_dims[1]
    walk.labels.unify(channels, w_dims[0], why)
    if groups > 1:
        outer, _ = _grouped(walk, node, weight, channels, None, shape(weight)[0], groups)
        out = walk.labels.merge([outer, out], [groups, shape(weight)[1]])
    if bias is not None:
        walk.labels.unify(out, walk.dims(bias)[0], why)
    walk.produces(weight, 1)
    walk.kind("channel", out)
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


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """softmax(q k^T) v for q [..., H, L, D], k [..., H, S, D], v [..., H, S, E].

    The scale that stands in the code, or is 1 / sqrt(D), must not change: the proof sees to it.
    With enable_gqa each head of k and v serves several neighbouring ones of q.
    """
    why = walk.reason(node)
    q, k, v = (walk.dims(args[name]) for name in ("query", "key", "value"))
    walk.labels.unify(q[-1], k[-1], why)
    freeze(walk, (q[-2], k[-2], v[-2]), why)
    *leading, length, width = shape(args["query"])
    keys, value_width = shape(args["value"])[-2:]
    out: list[Vector | None] = []
    for d, size in enumerate(leading):
        serves = size // max(1, shape(args["key"])[d])
        for other in (k[d], v[d]):
            copied = other if other is None or serves == 1 else np.repeat(other, serves)
            walk.labels.unify(q[d], copied, why)
        out.append(q[d])
        walk.kind("head", q[d])
    walk.kind("head_dim", q[-1])
    walk.kind("head_dim", v[-1])
    mask = args.get("attn_mask")
    if mask is not None:
        of_mask = walk.dims(mask)
        freeze(walk, of_mask[-2:], why)
        for back in range(-len(of_mask), -2):
            if shape(mask)[back] > 1:
                walk.labels.unify(out[back + 2], of_mask[back], why)
    walk.product(node, length * keys, (*out, q[-1]), (*leading, width))
    walk.product(node, length * keys, (*out, v[-1]), (*leading, value_width))
    return (*out, None, v[-1])


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
        freeze(walk, dims[-normalized:-1], why)
    walk.statistic(node, len(dims) - 1, dims[-1])
    walk.kind("width", dims[-1])
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
    else:
        walk.statistic(node, 1, dims[1])
    walk.attribute(node, args.get("weight"), "num_channels", dims[1])
    return dims


# -- tables ---------------------------------------------------------------------------------------


@rule("embedding")
def embedding(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Rows are picked by number and stay; the embedded dimension is what the layer produces."""
    rows, width = walk.dims(args["weight"])
    walk.labels.freeze(rows, walk.reason(node))
    walk.produces(args["weight"], 1)
    walk.attribute(node, args["weight"], "embedding_dim", width)
    return (*[None] * len(shape(args["indices"])), width)
