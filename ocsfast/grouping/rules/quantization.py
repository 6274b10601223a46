"""Rules of fake quantization: rounding to multiples of a scale, one for all or one a channel."""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk


@rule("fake_quantize_per_tensor_affine", "_fake_quantize_learnable_per_tensor_affine")
def per_tensor(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """One scale for all: every dimension passes, and zero stays zero."""
    return walk.dims(node.args[0])


@rule("fake_quantize_per_channel_affine", "_fake_quantize_learnable_per_channel_affine")
def per_channel(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Scale k is of channel k, and so is what its module holds of each channel, integers too."""
    dims, scale, why = walk.dims(node.args[0]), args["scale"], walk.reason(node)
    channels, (size,) = dims[args["axis"]], shape(scale)
    if channels is None:
        return dims
    owner = walk.names.get(scale, "").rpartition(".")[0]
    if not owner:
        walk.labels.unify(channels, walk.dims(scale)[0], why)
        return dims
    module = walk.model.get_submodule(owner)
    for name, tensor in (*module.named_parameters(owner), *module.named_buffers(owner)):
        if tuple(tensor.shape) == (size,):
            walk.labels.unify(channels, walk.held(name, size), why)
    return dims
