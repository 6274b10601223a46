"""Rules of torchvision's operators: pooling regions, deformable convolution.

Rules are found by name, so torchvision need not be installed. Non-maximum suppression (`nms`) needs
none: in what can be traced, no weights stand before it.
"""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.rules.factories import FACTORIES
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, operator_name, shape
from ocsfast.grouping.walk import Value, Walk, per_result


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """input [N, C, H, W], rois [K, 5] -> [K, C, h, w]; roi_pool also returns places of maxima."""
    samples, channels, *spatial = walk.dims(args["input"])
    walk.freeze((samples, *spatial, *walk.dims(args["rois"])), walk.reason(node))
    out = (None, channels, None, None)
    return per_result(node, out)


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def ps_roi_align(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """input [N, C * h * w, H, W] -> [K, C, h, w]: each of h * w bins reads C channels of its own."""
    samples, channels, *spatial = walk.dims(args["input"])
    why = walk.reason(node)
    walk.freeze((samples, *spatial, *walk.dims(args["rois"])), why)
    sizes = list(shape(node.meta["val"][0])[1:])
    outer, *bins = walk.labels.split(channels, sizes, why)
    walk.freeze(bins, why)
    out = (None, outer, None, None)
    # The second result numbers the channel that each entry comes from; only gradients need it.
    return [out, (None, None, None, None)]


@rule("torchvision::deform_conv2d")
def deform_conv2d(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A convolution, weight [out, in, h, w], that reads where `offset` points, weighted by `mask`."""
    if args["groups"] != 1 or args["offset_groups"] != 1:
        return walk.give_up(node)
    x_dims, w_dims, why = walk.dims(args["input"]), walk.dims(args["weight"]), walk.reason(node)
    for name in ("offset", "mask"):  # they have channels for the places of the kernel
        walk.freeze(walk.dims(args[name]), why)
    walk.freeze((*x_dims[2:], *w_dims[2:]), why)
    walk.labels.unify(x_dims[1], w_dims[1], why)
    # Without a bias, torchvision makes a tensor of zeros, which follows the weight by itself.
    if operator_name(args["bias"].target) not in FACTORIES:
        walk.labels.unify(w_dims[0], walk.dims(args["bias"])[0], why)
    walk.produces(args["weight"], 0)
    walk.kind("channel", w_dims[0])
    walk.attribute(node, args["weight"], "in_channels", x_dims[1])
    walk.attribute(node, args["weight"], "out_channels", w_dims[0])
    return (x_dims[0], w_dims[0], None, None)
