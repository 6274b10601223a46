"""Rules of matrix products, einsum and attention, which also state what they cost."""

from __future__ import annotations

import math
from string import ascii_letters
from typing import Any

import numpy as np

from ocsfast.grouping.labels import Dims, Vector
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk


@rule("linear", "addmm")
def linear(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """y[..., o] = sum_i x[..., i] w[o, i] + b[o]. addmm takes the weight as [i, o]."""
    if "weight" in args:
        x, weight, bias, out_axis = args["input"], args["weight"], args["bias"], 0
    else:
        x, weight, bias, out_axis = args["mat1"], args["mat2"], args["self"], 1
    why = walk.reason(node)
    if len(shape(weight)) != 2:
        return walk.give_up(node)
    x_dims, w_dims = walk.dims(x), walk.dims(weight)
    walk.labels.unify(x_dims[-1], w_dims[1 - out_axis], why)
    out = w_dims[out_axis]
    if bias is not None:
        own = walk.dims(bias)
        if shape(bias)[-1:] == shape(weight)[out_axis : out_axis + 1]:
            walk.labels.unify(out, own[-1], why)
        walk.freeze(own[:-1], why)
    walk.produces(weight, out_axis)
    walk.attribute(node, weight, "in_features", x_dims[-1])
    walk.attribute(node, weight, "out_features", out)
    *leading, _ = shape(x)
    outer, inner = shape(weight)[out_axis], shape(weight)[1 - out_axis]
    walk.product(node, 1, (*x_dims[:-1], out, w_dims[1 - out_axis]), (*leading, outer, inner))
    return (*x_dims[:-1], out)


@rule("matmul", "mm", "_sparse_mm", "bmm", "baddbmm", "mv", "dot", "vdot")
def matmul(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Batched [..., m, k] @ [..., k, n]; a vector is a matrix of one row or column."""
    added = node.args[0] if "batch1" in args else None
    left, right = node.args[:2] if added is None else node.args[1:3]
    a, b, why = walk.dims(left), walk.dims(right), walk.reason(node)
    a_shape, b_shape, out_shape = shape(left), shape(right), shape(node)
    row, column = len(a) == 1, len(b) == 1
    if row:
        a, a_shape = (None, *a), (1, *a_shape)
    if column:
        b, b_shape = (*b, None), (*b_shape, 1)
    if row:
        out_shape = (*out_shape[: len(out_shape) - (not column)], 1, *out_shape[len(b_shape) - 2 :])
    if column:
        out_shape = (*out_shape, 1)
    walk.labels.unify(a[-1], b[-2], why)
    batch: list[Vector | None] = []
    for back in range(-len(out_shape), -2):
        full: list[Vector | None] = []
        for dims, own in ((a, a_shape), (b, b_shape)):
            if len(own) < -back:
                continue
            if own[back] == out_shape[back]:
                full.append(dims[back])
            else:
                walk.labels.freeze(dims[back], why)
        if len(full) == 2:
            walk.labels.unify(full[0], full[1], why)
        batch.append(full[0] if full else None)
    attends = left in walk.batched and right in walk.batched  # neither is a weight
    for vector in batch if attends else ():
        walk.kind("head", vector)
    if attends and any(walk.labels.live(vector) for vector in batch):
        walk.kind("head_dim", a[-1])
        walk.kind("head_dim", b[-1])
    result = (*batch, a[-2], b[-1])
    if not row and not column:  # torch counts no product with a vector
        walk.product(node, 1, (*result, a[-1]), (*out_shape, a_shape[-1]))
    if added is not None:
        _added(walk, added, result, out_shape, why)
    return (*batch, *([] if row else [a[-2]]), *([] if column else [b[-1]]))


def _added(walk: Walk, added: Any, result: Dims, sizes: tuple[int, ...], why: str) -> None:
    """What is added to a product broadcasts against it: dimensions of equal size have equal labels."""
    own = walk.dims(added)
    for back in range(-len(own), 0):
        if shape(added)[back] == sizes[back]:
            walk.labels.unify(result[back], own[back], why)


@rule("addbmm")
def addbmm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """self + the sum over b of batch1 [b, n, m] @ batch2 [b, m, p]: [n, p]. Zeros add nothing to it."""
    (batch, rows, inner), (other, mid, cols) = walk.dims(args["batch1"]), walk.dims(args["batch2"])
    why = walk.reason(node)
    walk.labels.unify(batch, other, why)
    walk.labels.unify(inner, mid, why)
    _added(walk, args["self"], (rows, cols), shape(node), why)
    return (rows, cols)


@rule("addmv")
def addmv(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """self + mat [n, m] @ vec [m]: [n]."""
    (rows, inner), (vector,) = walk.dims(args["mat"]), walk.dims(args["vec"])
    walk.labels.unify(inner, vector, walk.reason(node))
    _added(walk, args["self"], (rows,), shape(node), walk.reason(node))
    return (rows,)


@rule("bilinear")
def bilinear(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """y[.., o] = sum_ij input1[.., i] weight[o, i, j] input2[.., j] + bias[o].

    torch's counter of MACs leaves it out, and so does its cost here.
    """
    (*leading, first), (*others, second) = walk.dims(args["input1"]), walk.dims(args["input2"])
    out, *inner = walk.dims(args["weight"])
    why = walk.reason(node)
    for a, b in ((first, inner[0]), (second, inner[1]), *zip(leading, others, strict=True)):
        walk.labels.unify(a, b, why)
    if args["bias"] is not None:
        walk.labels.unify(out, walk.dims(args["bias"])[0], why)
    walk.produces(args["weight"], 0)
    named = {"in1_features": first, "in2_features": second, "out_features": out}
    for name, vector in named.items():
        walk.attribute(node, args["weight"], name, vector)
    return (*leading, out)


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x1 [.., p, m], x2 [.., r, m] -> [.., p, r]: zeros are no distance apart, so m may lose indices."""
    first, second = args["x1"], args["x2"]
    a, b, why = walk.dims(first), walk.dims(second), walk.reason(node)
    walk.labels.unify(a[-1], b[-1], why)
    batch: list[Vector | None] = []
    for back in range(-len(shape(node)), -2):
        full: list[Vector | None] = []
        for dims, own in ((a, shape(first)), (b, shape(second))):
            if len(own) >= -back and own[back] == shape(node)[back]:
                full.append(dims[back])
            elif len(own) >= -back:
                walk.labels.freeze(dims[back], why)
        for other in full[1:]:
            walk.labels.unify(full[0], other, why)
        batch.append(full[0])
    return (*batch, a[-2], b[-2])


@rule("pdist", "_pdist_forward")
def distances_within(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [n, m] -> the distances of all pairs of rows; all rows stay, and m may lose indices."""
    walk.labels.freeze(walk.dims(args["self"])[0], walk.reason(node))
    return (None,)


@rule("dist")
def distance(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """|a - b| as one number, of two tensors of one shape."""
    if shape(args["self"]) != shape(args["other"]):
        return walk.give_up(node)
    for a, b in zip(walk.dims(args["self"]), walk.dims(args["other"]), strict=True):
        walk.labels.unify(a, b, walk.reason(node))
    return ()


@rule("outer", "ger", "addr")
def outer(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """a [m], b [n] -> [m, n]; `addr` adds that to its first argument, which broadcasts."""
    a, b = (args["vec1"], args["vec2"]) if "vec1" in args else (args["self"], args["vec2"])
    result = (*walk.dims(a), *walk.dims(b))
    if a is not args["self"]:
        _added(walk, args["self"], result, shape(node), walk.reason(node))
    return result


@rule("einsum")
def einsum(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Same letter, same label, also twice in one operand (its diagonal).

    A letter that the result has not is summed over, and zeros add nothing to a sum.
    """
    why, operands = walk.reason(node), list(args["tensors"])
    terms, result = _letters(args["equation"], [len(shape(n)) for n in operands])
    vectors: dict[str, Vector | None] = {}
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, vector, size in zip(term, walk.dims(operand), shape(operand), strict=True):
            if size == 1:
                sizes.setdefault(letter, 1)
                continue
            if letter in vectors:
                walk.labels.unify(vectors[letter], vector, why)
            elif sizes.get(letter) == 1 or any(
                letter in other and shape(n)[other.index(letter)] == 1
                for other, n in zip(terms, operands, strict=True)
            ):
                walk.labels.freeze(vector, why)  # one index meets many
            vectors.setdefault(letter, vector)
            sizes[letter] = size
    if len(operands) > 1:
        if all(operand in walk.batched for operand in operands):
            _name_kinds(walk, terms, result, vectors)
        # torch sums a letter of one operand alone away before it multiplies.
        every = [x for x in sizes if x in result or sum(x in term for term in terms) > 1]
        if any(sizes[x] > 1 and x not in result for x in every):  # else torch multiplies elements
            walk.product(node, 1, [vectors.get(x) for x in every], [sizes[x] for x in every])
    return tuple(vectors.get(letter) for letter in result)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result; letters of their own stand for "..."."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    spare = "".join(c for c in ascii_letters if c not in equation)
    covered = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t),
        default=0,
    )
    rest = spare[:covered]
    if not arrow:  # then the result has the letters that occur once, in alphabetical order
        every = "".join(terms).replace(".", "")
        result = "..." + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    expanded = []
    for term, rank in zip(terms, ranks, strict=True):
        own = rank - len(term.replace("...", ""))
        expanded.append(term.replace("...", rest[len(rest) - own :] if own else ""))
    return expanded, result.replace("...", rest)


def _name_kinds(walk: Walk, terms: list[str], result: str, vectors: dict[str, Vector | None]) -> None:
    """As in `matmul`: letters of all operands and the result are heads, the others lie within a head."""
    common = [letter for letter in result if all(letter in term for term in terms)]
    for letter in common:
        walk.kind("head", vectors.get(letter))
    if any(walk.labels.live(vectors.get(letter)) for letter in common):
        for letter, vector in vectors.items():
            if letter not in common:
                walk.kind("head_dim", vector)


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "transformers::grouped_mm_fallback")
def grouped_mm(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x [tokens, k] times the matrix of each token's expert, of weight [experts, k, n]. Experts stay.

    torch demands rows of a multiple of 16 bytes. Under autocast that is 8 numbers, whatever the dtype of
    the weights, so kept counts are multiples of 8.
    """
    x, weight, why = node.args[0], node.args[1], walk.reason(node)
    if len(shape(x)) != 2 or len(shape(weight)) != 3:
        return walk.give_up(node)
    x_dims, w_dims = walk.dims(x), walk.dims(weight)
    walk.freeze((x_dims[0], w_dims[0]), why)
    walk.labels.unify(x_dims[1], w_dims[1], why)
    walk.found.multiple = math.lcm(walk.found.multiple, 8)
    bias = args.get("bias")
    if bias is not None:
        walk.labels.freeze(walk.dims(bias)[0], why)
        walk.labels.unify(w_dims[2], walk.dims(bias)[-1], why)
    tokens, inner = shape(x)
    walk.product(node, tokens, (w_dims[1], w_dims[2]), (inner, shape(weight)[2]))
    return (None, w_dims[2])


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """softmax(q k^T) v for q [..., H, L, D], k [..., H, S, D], v [..., H, S, E].

    A cut of D must not change the scale, which is 1 / sqrt(D) unless the code passes one; the proof
    finds where it would. With enable_gqa each head of k and v serves several neighbouring heads of q.
    """
    why = walk.reason(node)
    q, k, v = (walk.dims(args[name]) for name in ("query", "key", "value"))
    walk.labels.unify(q[-1], k[-1], why)
    walk.freeze((q[-2], k[-2], v[-2]), why)
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
        walk.freeze(of_mask[-2:], why)
        for back in range(-len(of_mask), -2):
            if shape(mask)[back] > 1:
                walk.labels.unify(out[back + 2], of_mask[back], why)
    walk.product(node, length * keys, (*out, q[-1]), (*leading, width))
    walk.product(node, length * keys, (*out, v[-1]), (*leading, value_width))
    return (*out, None, v[-1])
