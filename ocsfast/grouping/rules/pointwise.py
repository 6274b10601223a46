"""Rules of operators that work element by element: every dimension passes."""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk, per_result


@rule("pointwise", "where", "masked_fill", "complex", "polar", "normal", "binomial", "floor_divide")
def pointwise(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Operands broadcast: aligned from the right, dimensions of equal size have equal labels."""
    value = node.meta["val"]
    out_shape = shape(value[0] if isinstance(value, (list, tuple)) else value)
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
            else:  # one index that is spread over many can go with none of them
                walk.labels.freeze(vector, walk.reason(node))
        for other in full[1:]:
            walk.labels.unify(full[0], other, walk.reason(node))
        out.append(full[0] if full else None)
    return per_result(node, tuple(out))


@rule(
    *("clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy"),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
    *("identity", "_conj", "conj", "real", "imag", "requires_grad", "_to_cpu", "positive"),
    *("fill", "zero"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("bernoulli", "uniform", "exponential", "poisson", "random", "geometric", "log_normal", "cauchy"),
    *("randint_like", "resolve_conj", "resolve_neg", "pin_memory", "_pin_memory", "lift_fresh", "lift"),
    # Activations that torch does not tag as pointwise.
    *("hardswish", "hardsigmoid", "hardtanh", "relu6", "log_sigmoid", "rrelu", "rrelu_with_noise"),
    *("selu", "celu", "threshold", "softshrink", "hardshrink"),
)
def same(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The result has the shape of the first operand, index by index."""
    return walk.dims(node.args[0])


@rule("glu")
def glu(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [.., 2 n] -> [.., n]: index k of one half gates index k of the other."""
    dims = list(walk.dims(node.args[0]))
    vector = dims[args["dim"]]
    if vector is not None:
        first, second = vector[: vector.size // 2], vector[vector.size // 2 :]
        walk.labels.unify(first, second, walk.reason(node))
        dims[args["dim"]] = first
    return tuple(dims)


@rule("prelu")
def prelu(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """One slope for each channel goes with it; a single slope for all stays."""
    dims, (slope,) = walk.dims(node.args[0]), walk.dims(args["weight"])
    if shape(args["weight"])[0] > 1:
        walk.labels.unify(dims[1], slope, walk.reason(node))
        walk.attribute(node, args["weight"], "num_parameters", slope)
    return dims
