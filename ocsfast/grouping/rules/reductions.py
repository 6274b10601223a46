"""Rules of operators over whole dimensions: sums, averages, extremes, softmax, pooling, padding."""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.rules.pointwise import pointwise
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, operator_name, shape, writes
from ocsfast.grouping.walk import Value, Walk, per_result


def reduced_dims(args: dict[str, Any], ndim: int) -> list[int]:
    """The dimensions that an operator's `dim` argument names; all of them where it names none."""
    given = args.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return sorted({d % ndim for d in ([given] if isinstance(given, int) else given)})


def _reduced(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The labels of the dimensions that are left; with `keepdim` a reduced one has none."""
    dims = walk.dims(node.args[0])
    reduced = reduced_dims(args, len(dims))
    if args.get("keepdim"):
        out = tuple(None if d in reduced else v for d, v in enumerate(dims))
    else:
        out = tuple(v for d, v in enumerate(dims) if d not in reduced)
    return per_result(node, out)


@rule("sum", "nansum", "linalg_vector_norm", "norm", "linalg_norm", "count_nonzero")
def contract(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Zeros add nothing to a sum, so a reduced dimension may lose indices."""
    return _reduced(walk, node, args)


@rule("mean", "nanmean", "var", "std", "var_mean", "std_mean")
def average(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A reduced dimension may lose indices; the average then runs over those that are left."""
    dims = walk.dims(node.args[0])
    reduced = reduced_dims(args, len(dims))
    for d in reduced:
        walk.statistic(node, d, dims[d])
        if len(reduced) < len(dims):  # a loss averages over everything
            walk.kind("width", dims[d])
    return _reduced(walk, node, args)


@rule("amax", "amin", "max", "min", "aminmax", "logsumexp", "prod", "any", "all")
def extreme(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [.., n, ..] -> [.., ..]: as of an average, only the indices of n that are left are looked at.

    A zero may be the largest value, so the proof leaves pruned indices out. The place of an extreme,
    which `max` and `min` over one dimension return as well, counts from the first index: who uses it
    keeps all of them.
    """
    if "other" in args:  # max(a, b) works element by element
        return pointwise(walk, node, args)
    dims = walk.dims(node.args[0])
    _over_kept(walk, node, reduced_dims(args, len(dims)))
    if _uses_places(node):
        walk.freeze([dims[d] for d in reduced_dims(args, len(dims))], walk.reason(node))
    if "dim" in args:
        return _reduced(walk, node, args)
    return per_result(node, ())


def _uses_places(node: Node) -> bool:
    """Whether something reads the second result of `max` or `min` over one dimension: the places."""
    several = operator_name(node.target) in ("max", "min") and isinstance(
        node.meta["val"], (list, tuple)
    )
    return several and any(user.args[1] == 1 and user.users for user in node.users)


def _over_kept(walk: Walk, node: Node, dims: list[int]) -> None:
    """The operator runs over the indices of these dimensions that are left."""
    own = walk.dims(node.args[0])
    for d in dims:
        if writes(node):  # the proof's reference could not write over a part of them
            walk.labels.freeze(own[d], walk.reason(node))
        else:
            walk.statistic(node, d, own[d])
            walk.spare(own[d])


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumprod", "logcumsumexp")
def shared_out(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [.., n, ..] -> the same shape: every index of n depends on the others that are left."""
    dims = walk.dims(node.args[0])
    if dims:
        _over_kept(walk, node, [args["dim"] % len(dims)])
    return dims


@rule("cumsum", "renorm")
def adding(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x -> the same shape. Zeros add nothing to the sums behind them, nor to the norm of a slice."""
    return walk.dims(node.args[0])


# They return as many indices as they get, or places among these: no dimension disappears.
ORDERING = ("topk", "sort", "argsort", "kthvalue", "cummax", "cummin", "median", "mode")


@rule("argmax", "argmin", *ORDERING)
def order(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """They return places, or as many values as the code asks for: `dim` keeps all its indices."""
    dims = walk.dims(node.args[0])
    reduced = reduced_dims(args, len(dims))
    walk.freeze(tuple(dims[d] for d in reduced), walk.reason(node))
    if "dim" in args and operator_name(node.target) not in ORDERING:
        return _reduced(walk, node, args)
    out = tuple(None if d in reduced else v for d, v in enumerate(dims))
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        fits = len(shape(value[0])) == len(out)
        return [out if fits else _reduced_to(out, reduced)] * len(value)
    return out if len(shape(node)) == len(out) else None


def _reduced_to(dims: tuple[Vector | None, ...], reduced: list[int]) -> tuple[Vector | None, ...]:
    """The labels without the reduced dimensions."""
    return tuple(v for d, v in enumerate(dims) if d not in reduced)


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)
def spatial(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [N, C, ..]: batch and channels pass; spatial dimensions are frozen."""
    dims = walk.dims(node.args[0])
    walk.freeze(dims[2:], walk.reason(node))
    return per_result(node, (*dims[:2], *[None] * (len(dims) - 2)))


@rule("pad", "constant_pad_nd")
def pad(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """`pad` holds a pair for each dimension, the last one first. A padded dimension is frozen."""
    dims = list(walk.dims(node.args[0]))
    amounts = args["pad"]
    for k in range(len(amounts) // 2):
        if amounts[2 * k] or amounts[2 * k + 1]:
            walk.labels.freeze(dims[-1 - k], walk.reason(node))
            dims[-1 - k] = None
    return tuple(dims)
