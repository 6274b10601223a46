"""Rules of convolutions, norms and embeddings. A convolution's rule also states its cost."""

from __future__ import annotations

import math
from typing import Any

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [N, in, ..], weight [out, in / groups, *kernel]. Depthwise is the case groups = in."""
    if args.get("transposed"):
        return conv_transposed(walk, node, args)
    x, weight, bias, groups = args["input"], args["weight"], args["bias"], args["groups"]
    x_dims, w_dims, why = walk.dims(x), walk.dims(weight), walk.reason(node)
    channel = len(x_dims) - (len(w_dims) - 1)  # 1; 0 for one sample without a batch dimension
    walk.freeze((*x_dims[channel + 1 :], *w_dims[2:]), why)
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
    each = math.prod(shape(node)[channel + 1 :]) * math.prod(shape(weight)[2:])
    # Labels of the batch count too: some code folds heads into it.
    walk.product(
        node, each, (*x_dims[:channel], out, w_dims[1]), (*shape(x)[:channel], *shape(weight)[:2])
    )
    return (*x_dims[:channel], out, *[None] * (len(w_dims) - 2))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transposed(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [N, in, ..], weight [in, out / groups, *kernel]."""
    x, weight, bias, groups = args["input"], args["weight"], args["bias"], args["groups"]
    x_dims, w_dims, why = walk.dims(x), walk.dims(weight), walk.reason(node)
    channel = len(x_dims) - (len(w_dims) - 1)
    walk.freeze((*x_dims[channel + 1 :], *w_dims[2:]), why)
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
    each = math.prod(shape(x)[channel + 1 :]) * math.prod(shape(weight)[2:])
    sizes = (*shape(x)[:channel], *shape(weight)[:2])
    walk.product(node, each, (*x_dims[:channel], channels, w_dims[1]), sizes)
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
    """Split the input channels, and the weight's rows, into (group, place in it); equate the groups.

    Returns:
        The labels of the groups, and those of an input channel's place in its group.
    """
    why = walk.reason(node)
    num_channels = channels.size if channels is not None else groups
    outer, rest = walk.labels.split(channels, [groups, num_channels // groups], why)
    if rows is not None or channels is None:
        row_outer, _ = walk.labels.split(rows, [groups, num_rows // groups], why)
        if row_outer is not None or outer is not None:
            walk.labels.unify(outer, row_outer, why)
    walk.attribute(node, weight, "groups", outer)
    walk.counted(node, outer, groups)
    return outer, rest


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
def batch_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [N, C, ..]: affine parameters and running statistics go with the channels."""
    dims, why = walk.dims(node.args[0]), walk.reason(node)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if args.get(name) is not None:
            walk.labels.unify(dims[1], walk.dims(args[name])[0], why)
    if args.get("training") or args.get("use_input_stats"):
        # Statistics of the input itself. A standardized weight [1, out, in * kernel] takes them over its
        # inputs, of which some may go; any other dimension that is averaged stays.
        last = len(dims) - 1
        over = set(range(2, len(dims))) | ({0} if args.get("training") else set())
        walk.freeze([dims[d] for d in over if d != last or "training" not in args], why)
        if last in over and "training" in args:
            walk.statistic(node, last, dims[last])
    walk.attribute(node, args.get("weight"), "num_features", dims[1])
    return dims


@rule("layer_norm", "rms_norm")
def layer_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """After a cut its mean and variance run over fewer features; `proof/reference.py` does the same."""
    dims, why = walk.dims(args["input"]), walk.reason(node)
    normalized = len(args["normalized_shape"])
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            for own, vector in zip(walk.dims(args[name]), dims[-normalized:], strict=True):
                walk.labels.unify(vector, own, why)
    if normalized > 1:
        walk.freeze(dims[-normalized:-1], why)
    walk.statistic(node, len(dims) - 1, dims[-1])
    walk.kind("width", dims[-1])
    walk.attribute(node, args.get("weight"), "normalized_shape", dims[-1])
    walk.sized(node, normalized - 1, dims[-1], shape(args["input"])[-1])
    return dims


@rule("group_norm")
def group_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Whole groups may go, since each has a mean of its own. With one group, single channels may go."""
    dims, groups, why = walk.dims(args["input"]), args["num_groups"], walk.reason(node)
    channels = shape(args["input"])[1]
    walk.freeze(dims[2:], why)
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            walk.labels.unify(dims[1], walk.dims(args[name])[0], why)
    if groups > 1:
        outer, inner = walk.labels.split(dims[1], [groups, channels // groups], why)
        walk.labels.freeze(inner, why)
        walk.attribute(node, args.get("weight"), "num_groups", outer)
        walk.sized(node, 0, outer, groups)
    else:
        walk.statistic(node, 1, dims[1])
    walk.attribute(node, args.get("weight"), "num_channels", dims[1])
    return dims


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """g v / |v|. The norm runs over all dimensions but one, which g shares; zeros add nothing to it."""
    v, g, why = args["v"], args["g"], walk.reason(node)
    for d, vector in enumerate(walk.dims(g)):
        if shape(g)[d] == shape(v)[d]:
            walk.labels.unify(walk.dims(v)[d], vector, why)
        else:
            walk.labels.freeze(vector, why)
    if v in walk.names:  # a layer that takes the result for its weight produces the rows of v
        walk.names[node] = walk.names[v]
    value = node.meta["val"]
    return [walk.dims(v), walk.dims(g)] if isinstance(value, (list, tuple)) else walk.dims(v)


@rule("embedding")
def embedding(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """weight [rows, width]: rows are picked by number and stay; the width is what the layer produces."""
    rows, width = walk.dims(args["weight"])
    walk.labels.freeze(rows, walk.reason(node))
    walk.produces(args["weight"], 1)
    walk.attribute(node, args["weight"], "embedding_dim", width)
    return (*[None] * len(shape(args["indices"])), width)


@rule("embedding_renorm")
def embedding_renorm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """self [rows, width]: rows longer than `max_norm` are scaled. Zeros add nothing to a norm."""
    dims = walk.dims(args["self"])
    walk.labels.freeze(dims[0], walk.reason(node))
    return dims


@rule("embedding_bag")
def embedding_bag(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """weight [rows, width] -> [bags, width], and three results that count rows and bags.

    As `embedding`; a bag is the sum, the mean or the largest of its rows, each width by itself. With
    `mode="max"` the last result, [bags, width], holds row numbers.
    """
    rows, width = walk.dims(args["weight"])
    walk.freeze((rows, *walk.dims(args["per_sample_weights"])), walk.reason(node))
    walk.produces(args["weight"], 1)
    walk.attribute(node, args["weight"], "embedding_dim", width)
    of_rows = (None, width) if len(shape(node.meta["val"][3])) == 2 else None
    return [(None, width), None, None, of_rows]
