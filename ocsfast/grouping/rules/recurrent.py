"""Rules of recurrent operators: a hidden unit is a row of every gate and a column of the recurrence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """A unit whose weights and biases are zero has the output zero, whatever its gates say.

    One attribute, `hidden_size`, counts the units of all layers and directions: they shrink together.
    """
    why = walk.reason(node)
    known = ("input", "hx", "params", "has_biases", "num_layers", "bidirectional")
    if any(name not in args for name in known):  # the overload for packed sequences
        return walk.give_up(node)
    x, ways = args["input"], 2 if args["bidirectional"] else 1
    states = args["hx"] if isinstance(args["hx"], (list, tuple)) else [args["hx"]]
    hidden = shape(states[-1])[-1]
    per_layer = 4 if args["has_biases"] else 2
    params = list(args["params"])
    if len(params) != args["num_layers"] * ways * per_layer or shape(states[0])[-1] != hidden:
        return walk.give_up(node)  # an LSTM with projections
    flowing, units = walk.dims(x)[-1], None
    owner = params[0]
    walk.attribute(node, owner, "input_size", flowing)
    steps = math.prod(shape(x)[:-1])
    for layer in range(args["num_layers"]):
        outputs: list[Vector | None] = []
        for way in range(ways):
            start = (layer * ways + way) * per_layer
            own = _layer(walk, node, params[start : start + per_layer], flowing, hidden, steps)
            if layer or way:
                walk.labels.unify(units, own, why)
            else:
                units = own
            outputs.append(own)
        parts = [np.zeros(hidden, dtype=np.int64) if v is None else v for v in outputs]
        flowing = np.concatenate(parts)
    walk.attribute(node, owner, "hidden_size", units)
    for state in states:  # as a rule zeros, of which the module makes `hidden_size`
        walk.labels.unify(units, walk.dims(state)[-1], why)
    leading = walk.dims(x)[:-1]
    for vector in leading:
        walk.labels.freeze(vector, why)
    states_out = [(*[None] * (len(shape(s)) - 1), units) for s in states]
    return [(*[None] * len(leading), flowing), *states_out]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """One step: input [.., I], hx [.., H], or (h, c) of an LSTM -> the new hx.

    Weights are as in `_layer`: w_ih [gates * H, I], w_hh [gates * H, H].
    """
    x, states = args["input"], args["hx"]
    several = isinstance(states, (list, tuple))
    params = [args[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if args[name] is not None]
    *leading, flowing = walk.dims(x)
    hidden, why = shape(args["w_hh"])[1], walk.reason(node)
    walk.attribute(node, args["w_ih"], "input_size", flowing)
    units = _layer(walk, node, params, flowing, hidden, math.prod(shape(x)[:-1]))
    walk.attribute(node, args["w_ih"], "hidden_size", units)
    for state in states if several else [states]:
        walk.labels.unify(units, walk.dims(state)[-1], why)
        walk.freeze(walk.dims(state)[:-1], why)
    walk.freeze(leading, why)
    out = (*[None] * len(leading), units)
    return [out, out] if several else out


def _layer(
    walk: Walk, node: Node, params: list[Any], flowing: Vector | None, hidden: int, steps: int
) -> Vector | None:
    """One layer in one direction: weight_ih [gates * H, I], weight_hh [gates * H, H] and biases.

    Returns:
        The labels of its H hidden units.
    """
    why = walk.reason(node)
    w_ih, w_hh = params[:2]
    walk.labels.unify(flowing, walk.dims(w_ih)[1], why)
    units = walk.dims(w_hh)[1]
    for tensor in params:
        rows = walk.dims(tensor)[0]
        if rows is None:
            walk.labels.freeze(units, why)
            continue
        for first in range(0, rows.size, hidden):
            walk.labels.unify(rows[first : first + hidden], units, why)
    walk.produces(w_ih, 0)
    rows = walk.dims(w_ih)[0]
    for weight, inner in ((w_ih, flowing), (w_hh, units)):
        walk.product(node, steps, (rows, inner), shape(weight))
    return units
