"""Rules of operators on spatial dimensions: patches, shuffles, padding, resampling, transforms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.rules.factories import FACTORIES
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, operator_name, shape
from ocsfast.grouping.walk import Value, Walk, per_result


def _frozen_tail(walk: Walk, node: Node, lead: int) -> tuple[Vector | None, ...]:
    """Freeze all dimensions of the input but the first `lead`, and return the labels of these."""
    dims = walk.dims(node.args[0])
    walk.freeze(dims[lead:], walk.reason(node))
    return dims[:lead]


def _parts(node: Node, lead: int) -> list[int]:
    """How many output channels there are, and how many input channels become one of them."""
    channels = shape(node)[lead - 1]
    return [channels, shape(node.args[0])[lead - 1] // channels]


@rule("unfold")
def unfold(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Windows along one dimension; the places inside a window become a new last dimension."""
    dims = list(walk.dims(node.args[0]))
    if dims:
        walk.labels.freeze(dims[args["dimension"]], walk.reason(node))
        dims[args["dimension"]] = None
    return (*dims, None)


@rule("im2col")
def im2col(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """[.., C, H, W] -> [.., C * kernel, places]."""
    lead = len(shape(node)) - 1
    out = list(_frozen_tail(walk, node, lead))
    if out[-1] is not None:
        out[-1] = np.repeat(out[-1], math.prod(args["kernel_size"]))
    return (*out, None)


@rule("col2im")
def col2im(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """[.., C * kernel, places] -> [.., C, H, W]."""
    lead = len(shape(node)) - 2
    out = list(_frozen_tail(walk, node, lead))
    out[-1], kernel = walk.labels.split(out[-1], _parts(node, lead), walk.reason(node))
    walk.labels.freeze(kernel, walk.reason(node))
    return (*out, None, None)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """[.., C * r * r, H, W] -> [.., C, H * r, W * r]; pixel_unshuffle is the way back."""
    lead = len(shape(node)) - 2
    out = list(_frozen_tail(walk, node, lead))
    if operator_name(node.target) == "pixel_unshuffle":
        if out[-1] is not None:
            out[-1] = np.repeat(out[-1], args["downscale_factor"] ** 2)
    else:
        out[-1], inside = walk.labels.split(out[-1], _parts(node, lead), walk.reason(node))
        walk.labels.freeze(inside, walk.reason(node))
    return (*out, None, None)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """[N, groups * C, ..] -> [N, C * groups, ..]."""
    dims, groups = list(walk.dims(node.args[0])), args["groups"]
    channels = shape(node)[1]
    outer, inner = walk.labels.split(dims[1], [groups, channels // groups], walk.reason(node))
    walk.labels.freeze(outer, walk.reason(node))  # the number of groups stands in the module's code
    dims[1] = walk.labels.merge([inner, outer], [channels // groups, groups])
    return tuple(dims)


@rule(
    *("upsample_linear1d", "upsample_trilinear3d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
    *("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa"),
    *("_upsample_bicubic2d_aa", "_adaptive_avg_pool3d", "max_pool2d_with_indices"),
    *("max_pool3d_with_indices", "mkldnn_max_pool2d", "_upsample_lanczos2d_aa"),
)
def resample(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [N, C, ..]: batch and channels pass; spatial dimensions and other operands are frozen."""
    for other in node.all_input_nodes[1:]:
        walk.freeze_all(other, walk.reason(node))
    lead = _frozen_tail(walk, node, 2)
    rank = len(shape(node.args[0]))
    return per_result(node, (*lead, *[None] * (rank - 2)))


@rule("max_unpool2d", "max_unpool3d", "fractional_max_pool2d", "fractional_max_pool3d")
def place_by_channel(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [.., C, places]. The second operand says for each channel which places within it are meant.

    That is `indices` [.., C, places] or `random_samples` [N, C, number of places].
    """
    places = 2 if operator_name(node.target).endswith("2d") else 3
    source: Any = node.args[0]
    other: Any = args.get("indices", args.get("random_samples"))
    lead, own = _frozen_tail(walk, node, len(shape(source)) - places), walk.dims(other)
    if operator_name(other.target) in FACTORIES:  # torch makes random numbers for the channels there are
        return per_result(node, (*lead, *[None] * places))
    for back in range(1, len(lead) + 1):
        if "indices" in args:
            walk.labels.unify(lead[-back], own[-back - places], walk.reason(node))
        elif back < len(own):
            walk.labels.unify(lead[-back], own[-back - 1], walk.reason(node))
    return per_result(node, (*lead, *[None] * places))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sample(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Every channel is sampled at the places that the grid says."""
    return resample(walk, node, args)


@rule(
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "_pad_circular"),
)
def pad_by_copies(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The last dimensions are padded with copies of their own indices, and are frozen."""
    padded = len(args.get("padding") or args["pad"]) // 2
    rank = len(shape(node))
    return (*_frozen_tail(walk, node, rank - padded), *[None] * padded)


@rule(
    *("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft"),
    *("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2"),
    *("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_fftshift", "fft_ifftshift"),
)
def transform(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A transformed dimension mixes all its indices and is frozen; the others pass."""
    dims = list(walk.dims(node.args[0]))
    given = args.get("dim")
    several = given if given is not None else range(len(dims))
    for d in (several,) if isinstance(several, int) else several:
        walk.labels.freeze(dims[d], walk.reason(node))
        dims[d] = None
    return tuple(dims)


@rule("view_as_real")
def view_as_real(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The real and the imaginary part become a new last dimension."""
    return (*walk.dims(node.args[0]), None)


@rule("view_as_complex")
def view_as_complex(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The last dimension, a pair of numbers, disappears."""
    return _frozen_tail(walk, node, len(shape(node)))


@rule("tril", "triu")
def triangle(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Which entries are kept depends on their row and column number."""
    lead = len(shape(node)) - 2
    return (*_frozen_tail(walk, node, lead), None, None)


@rule("rot90")
def turn(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The two dimensions that are turned keep all their indices; the others pass."""
    dims = list(walk.dims(node.args[0]))
    for d in args["dims"]:
        walk.labels.freeze(dims[d], walk.reason(node))
        dims[d] = None
    return tuple(dims)
