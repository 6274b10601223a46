"""Labels, carried through a traced graph from its parameters to its outputs by the operators' rules."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.grouping.findings import RawOperation, RawProduct
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.operators import HARMLESS, frozen_by
from ocsfast.grouping.rules.factories import FACTORIES
from ocsfast.grouping.rules.registry import RULES
from ocsfast.grouping.time_limit import TimeLimit
from ocsfast.grouping.trace.nodes import (
    Node,
    arguments,
    is_pointwise,
    module_of,
    operator_name,
    shape,
    source_of,
    spoken,
    writes,
    written,
)
from ocsfast.grouping.trace.shapes import sizes_of
from ocsfast.grouping.walk import Value, Walk

# A rule runs where some operand has a live label: one that may still be removed. The rules of these
# operators always run, because they also state a cost, or because a size that the model's code passes
# them may tie their result to an attribute or to another tensor.
COUNTED = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "einsum"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"}
)
SIZED = (*FACTORIES, "expand", "broadcast_to", "repeat")
# Of the input of these, all dimensions but the last count rows.
ROWWISE = frozenset({"linear", "addmm", "mm", "lstm", "gru", "rnn_tanh", "rnn_relu"})


class Propagation:
    """Runs one graph on labels.

    Args:
        walk: the graph, and where its findings go.
        outputs: numbers of the outputs that keep their shape; None: all.
        alone: whether the graph of the model's other mode is unknown.
        deadline: looked at before every operator.
    """

    def __init__(
        self,
        walk: Walk,
        *,
        outputs: Collection[int] | None = None,
        alone: bool = False,
        deadline: TimeLimit | None = None,
    ) -> None:
        self.walk = walk
        self.outputs = outputs
        self.alone = alone
        self.deadline = deadline
        self._first_names = _first_names(walk.model)

    def run(self) -> None:
        """Label every node of the graph.

        Raises:
            GroupingTimeout: the deadline is over.
        """
        walk = self.walk
        walk.found.read |= walk.trace.read
        position = 0
        for node in walk.trace.graph.graph.nodes:
            if any(source in walk.batched for source in node.all_input_nodes) or self._per_sample(node):
                walk.batched.add(node)
            if node.op == "placeholder":
                if position >= len(walk.trace.state):
                    walk.batched.add(node)
                walk.values[node] = self._placeholder(node, position)
                position += 1
            elif node.op == "output":
                for number, out in enumerate(node.args[0]):
                    if isinstance(out, Node) and (self.outputs is None or number in self.outputs):
                        self._output(number, out)
            elif node.target is operator.getitem:
                source = walk.values.get(node.args[0])
                walk.values[node] = source[node.args[1]] if isinstance(source, list) else None
            elif node.op == "call_function":
                self._call(node)
                if walk.count:
                    walk.found.operations += _operation(walk, node)

    def _placeholder(self, node: Node, position: int) -> Value:
        """Fresh atoms for every axis of a parameter, or of a buffer of floats or booleans; else none."""
        walk, found = self.walk, self.walk.found
        if position >= len(walk.trace.state) or walk.trace.state[position] is None:
            return None
        name = self._first_names[str(walk.trace.state[position])]
        walk.names[node] = name
        if node.users:
            found.used.add(name)
        if name not in found.state:
            tensor: Tensor = node.meta["val"]
            live = tensor.is_floating_point() or tensor.dtype is torch.bool  # masks of channels
            # An axis of one index can never shrink, and would freeze what it broadcasts against.
            found.state[name] = tuple(
                walk.labels.fresh(size) if live and size > 1 else None for size in tensor.shape
            )
        return found.state[name]

    def _per_sample(self, node: Node) -> bool:
        """Whether the call makes a tensor for as many samples as another tensor has."""
        return any(
            dim == 0 and other in self.walk.batched and shape(other)[:1] == (self.walk.trace.samples,)
            for other, dim in sizes_of(node).values()
        )

    def _call(self, node: Node) -> None:
        walk = self.walk
        if self.deadline is not None:
            self.deadline.check(f"at {source_of(node)}")
        name = operator_name(node.target)
        rule = RULES.get(name)
        if rule is None and is_pointwise(node.target):
            rule = RULES["pointwise"]
        if walk.count and not walk.found.apart and node in walk.batched and self._is_apart(node, name):
            walk.found.apart = module_of(node) or source_of(node)
        if rule is not None and (name in COUNTED or name in SIZED or self._is_live(node)):
            walk.values[node] = rule(walk, node, arguments(node))
            self._written(node)
        else:
            self._without_rule(node, name)
        walk.found.made.setdefault(module_of(node), []).extend(walk.flat(node))
        if self.alone and not node.users and not writes(node):
            walk.freeze_all(node, "computed but not returned, and the other mode is not known")

    def _is_apart(self, node: Node, name: str) -> bool:
        """Whether a layer gets a number of rows that the number of samples does not divide."""
        if not (name in ROWWISE or name.startswith("conv")):
            return False
        given, samples = arguments(node), self.walk.trace.samples
        source = next(given[key] for key in ("input", "mat1", "self") if key in given)
        x = shape(source)
        if source not in self.walk.batched or not x:
            return False
        if name in ROWWISE:
            return math.prod(x[:-1]) % samples > 0
        return len(x) < len(shape(given["weight"])) or x[0] % samples > 0

    def _written(self, node: Node) -> None:
        """What an operator writes into a tensor that it is given has the labels of its result.

        The tensor may be a view: its labels are the same terms as those of what it is a view of.
        """
        walk, value = self.walk, node.meta["val"]
        several = isinstance(value, (list, tuple))
        for tensor, place in written(node):
            labels: Any = walk.values[node]
            own = labels[place] if isinstance(labels, list) else labels
            if own is None or shape(tensor) != shape(value[place] if several else value):
                walk.freeze_all(tensor, walk.reason(node))
                walk.freeze_all(node, walk.reason(node))
                continue
            for old, new in zip(walk.dims(tensor), own, strict=True):
                walk.labels.unify(old, new, walk.reason(node))

    def _is_live(self, node: Node) -> bool:
        """Whether some index of an operand may still be removed."""
        walk = self.walk
        return any(
            walk.labels.live(vector) for source in node.all_input_nodes for vector in walk.flat(source)
        )

    def _without_rule(self, node: Node, name: str) -> None:
        """Count what the operator costs, and freeze what flows into it."""
        walk = self.walk
        if walk.count:
            macs = _count_macs(node)
            if macs:
                batched = node in walk.batched
                walk.found.products.append(RawProduct(macs, (), (), module_of(node), batched))
        if name in HARMLESS or not self._is_live(node):
            return
        where, why = source_of(node), frozen_by(name)
        if why is None:
            walk.found.unknown[where] = spoken(name)
        reason = f"no rule for {spoken(name)} ({where})"
        if why is not None:
            reason = f"{spoken(name)} ({where}): {why}"
        for source in node.all_input_nodes:
            walk.freeze_all(source, reason)

    def _output(self, number: int, out: Node) -> None:
        """What the model returns keeps its shape, and so does what its pass leaves behind of the inputs.

        What a pass leaves behind of the parameters alone, as old weight_norm does, the next pass makes
        anew, so it may shrink.
        """
        walk, returned = self.walk, len(self.walk.trace.outputs)
        if number < returned:
            walk.freeze_all(out, "model output" + " in training" * walk.training)
        elif out in walk.batched:
            walk.freeze_all(out, f"left behind in {walk.trace.left[number - returned]}")


def _operation(walk: Walk, node: Node) -> list[RawOperation]:
    """The call as a record, of an operator that makes tensors."""
    made = node.meta.get("val")
    results = list(made) if isinstance(made, (list, tuple)) else [made]
    if not results or not all(isinstance(result, Tensor) for result in results):
        return []
    value = walk.values.get(node)
    labels: list[Any] = value if isinstance(value, list) else [value]
    given = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    shapes = (*map(shape, given), *map(shape, results))
    vectors = [*map(walk.dims, given), *labels, *([None] * (len(results) - len(labels)))]
    dims = tuple(
        own if isinstance(own, tuple) and len(own) == len(sizes) else (None,) * len(sizes)
        for own, sizes in zip(vectors, shapes, strict=True)
    )
    return [RawOperation(node.name, str(node.target), module_of(node), shapes, dims)]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor. Tied ones share it."""
    first: dict[int, str] = {}
    names = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _count_macs(node: Node) -> int:
    """MACs of one call by torch's own counter, computed on tensors without data."""
    computes = isinstance(node.meta.get("val"), (Tensor, tuple, list))
    if is_pointwise(node.target) or not computes:
        return 0
    if not node.all_input_nodes:  # it makes a tensor: nothing to count, and running it may draw numbers
        return 0

    def meta(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        known = value.meta.get("val")
        return known.to("meta") if isinstance(known, Tensor) else known

    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), meta)
    target: Any = node.target
    try:
        with torch.no_grad():
            return count_macs(lambda: target(*args, **kwargs))
    except Exception:  # every operator that torch counts has a meta implementation
        return 0
