"""Rules of torchvision's operators: pooling regions, deformable convolution.

They are known by name, so that torchvision need not be there. Suppression (`nms`) has no weights before
it in anything that can be traced, and so no rule.
"""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.propagate import FACTORIES, Node, Value, Walk, freeze, operator_name, rule, shape
from ocsfast.grouping.rules.products import give_up


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """input [N, C, H, W], rois [K, 5] -> [K, C, h, w]; roi_pool also returns where its maxima were."""
    samples, channels, *spatial = walk.dims(args["input"])
    freeze(walk, (samples, *spatial, *walk.dims(args["rois"])), walk.reason(node))
    out = (None, channels, None, None)
    return [out, out] if isinstance(node.meta["val"], (list, tuple)) else out


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def ps_roi_align(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """input [N, C * h * w, H, W] -> [K, C, h, w], each bin from channels of its own."""
    samples, channels, *spatial = walk.dims(args["input"])
    why = walk.reason(node)
    freeze(walk, (samples, *spatial, *walk.dims(args["rois"])), why)
    sizes = list(shape(node.meta["val"][0])[1:])
    outer, *bins = walk.labels.split(channels, sizes, why)
    freeze(walk, bins, why)
    out = (None, outer, None, None)
    # The second result numbers the channel that each entry comes from: good for nothing but gradients.
    return [out, (None, None, None, None)]


@rule("torchvision::deform_conv2d")
def deform_conv2d(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A convolution, weight [out, in, h, w], that reads at places that `offset` and `mask` give it."""
    if args["groups"] != 1 or args["offset_groups"] != 1:
        return give_up(walk, node)
    x_dims, w_dims, why = walk.dims(args["input"]), walk.dims(args["weight"]), walk.reason(node)
    for name in ("offset", "mask"):  # a channel each for every place of the kernel
        freeze(walk, walk.dims(args[name]), why)
    freeze(walk, (*x_dims[2:], *w_dims[2:]), why)
    walk.labels.unify(x_dims[1], w_dims[1], why)
    if operator_name(args["bias"].target) not in FACTORIES:  # the zeros that stand for no bias follow
        walk.labels.unify(w_dims[0], walk.dims(args["bias"])[0], why)
    walk.produces(args["weight"], 0)
    walk.kind("channel", w_dims[0])
    walk.attribute(node, args["weight"], "in_channels", x_dims[1])
    walk.attribute(node, args["weight"], "out_channels", w_dims[0])
    return (x_dims[0], w_dims[0], None, None)
