"""A traced graph as Python source that runs at any batch size and reads its sizes from a module.

In a traced graph every size that the model's code computed is a literal. Here each literal becomes an
attribute, so that a cut can set it, and a size that grows with the number of samples is computed from
that number. Operators that divide whole dimensions are spelled out: `chunk` by the sizes of its parts,
attention with its scale.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from ocsfast.core.errors import GroupingError
from ocsfast.grouping.graph.sizes import Sizes
from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.nodes import Node, arguments, operator_name, shape, source_of

# Arguments of torch's operators that are sizes of what flows through them.
SIZE_ARGUMENTS = frozenset(
    {"size", "sizes", "shape", "split_sizes", "normalized_shape", "groups", "num_groups"}
    | {"start", "end", "repeats"}
)
RESHAPING = ("view", "reshape", "_unsafe_view", "unflatten")  # one size may be -1: what is left
SPLITTING = ("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split")
ENDLESS = 2**62  # an `end` of a slice from here on means that it has none


@dataclass(frozen=True, eq=False)
class Program:
    """A graph, written as a function `forward(self, *inputs)`."""

    source: str  # a line that calls an operator ends with the user's file:line
    sizes: Sizes  # `self` has it as an attribute
    momenta: dict[str, float]  # by batch norm: `self` has it as `momentum` of the norm's module


def program(traced: Trace, other: Trace, name: str, *, training: bool) -> Program:
    """Write a graph as a program.

    Args:
        traced, other: the model with two numbers of samples; equal where its inputs allow one only.
        name: the attribute under which `self` will hold the sizes.
        training: the mode that was traced. A batch norm that was in that mode reads the mode from its
            module, so that freezing it works; one that was not stays as it was.

    Raises:
        GroupingError: the two graphs differ by more than sizes that are linear in the number of samples,
            or one calls other graphs.
    """
    return _Writer(traced, other, name, training).write()


class _Writer:
    """Copies the nodes of a graph one by one, comparing each with its twin of another batch size."""

    def __init__(self, traced: Trace, other: Trace, name: str, training: bool) -> None:
        self.traced, self.other, self.name, self.training = traced, other, name, training
        self.sizes = Sizes()
        self.momenta: dict[str, float] = {}
        self.graph = torch.fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.twins: dict[Node, Node] = {}
        self.state: dict[Node, str] = {}  # names of parameters and buffers
        self.places: dict[str, str] = {}  # of each copy: the user's file:line
        self.batch: Node | None = None  # the first input that holds samples
        self.device: torch.device | None = None  # the device of that input in the trace
        self.shared: dict[str, Node] = {}  # nodes that many others read, made once

    def write(self) -> Program:
        nodes, others = list(self.traced.graph.graph.nodes), list(self.other.graph.graph.nodes)
        if [(n.op, str(n.target)) for n in nodes] != [(n.op, str(n.target)) for n in others]:
            raise GroupingError(
                f"the model's graph with {self.other.samples} samples is not the one with "
                f"{self.traced.samples}: its code branches on their number"
            )
        self.twins = dict(zip(nodes, others, strict=True))
        self._placeholders([node for node in nodes if node.op == "placeholder"])
        for node in nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                given, again = self._returned(node), self._returned(self.twins[node])
                self.graph.output(self._merged(node, given, again))
            elif node.op != "placeholder" and node.users:
                self._refuse(node, f"it calls {node.target}, a graph of its own")
        return Program(self._source(), self.sizes, self.momenta)

    def _placeholders(self, given: list[Node]) -> None:
        """Inputs stay placeholders; parameters, buffers and constants become attributes of `self`."""
        for node in given[len(self.traced.state) :]:
            self.copies[node] = self.graph.placeholder(node.name)
            if self.batch is None and shape(node):
                self.batch, self.device = self.copies[node], node.meta["val"].device
        if self.batch is None:
            raise GroupingError("the inputs hold no tensor with samples: pass example inputs that do")
        for number, node in enumerate(given[: len(self.traced.state)]):
            if node.users:
                self.copies[node] = self._state(node, number)

    def _state(self, node: Node, number: int) -> Node:
        """A parameter or buffer by its name in the model; a constant beside the sizes."""
        name = self.traced.state[number]
        if name is not None:
            self.state[node] = name
            return self.graph.get_attr(name)
        value, again = self.traced.constants[number], self.other.constants[number]
        if value.shape != again.shape or not torch.equal(value, again):
            self._refuse(node, "a constant of it depends on the number of samples")
        return self._attribute(node.name, value.detach().clone())

    def _returned(self, output: Node) -> list[Any]:
        """What the model returns, without what its pass leaves behind."""
        every: Any = output.args[0]
        return list(every)[: len(self.traced.outputs)]

    def _refuse(self, node: Node, why: str) -> None:
        raise GroupingError(f"the model's graph cannot stand for it: {why} ({source_of(node)})")

    def _call(self, node: Node) -> None:
        if operator_name(node.target) == "_assert_tensor_metadata":
            return  # it asserts the dtypes of the trace, and a user may run others
        if node.target is operator.getitem:
            part = (self._merged(node, node.args[0], self.twins[node].args[0]), node.args[1])
            self.copies[node] = self.graph.call_function(operator.getitem, part)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            self._refuse(node, f"it calls {node.target}, no operator of one kernel")
        (target, given), (_, other) = spelled_out(node), spelled_out(self.twins[node])
        if given.get("split_sizes") != other.get("split_sizes"):  # a split of the samples
            target, given, other = node.target, named(node), named(self.twins[node])
        if list(given) != list(other):
            self._refuse(node, "which arguments it gives depends on the number of samples")
        values = {name: self._argument(node, name, given, other) for name in given}
        ordered = (a for a in target._schema.arguments if not a.kwarg_only)
        by_position = [a.name for a in takewhile(lambda a: a.name in given, ordered)]
        args = tuple(values.pop(name) for name in by_position)
        copy = self.graph.create_node("call_function", target, args, values, name=node.name)
        self.copies[node] = copy
        self.places[copy.name] = source_of(node)

    def _argument(self, node: Node, name: str, given: dict[str, Any], other: dict[str, Any]) -> Any:
        """One argument of a call, its size literals read from the sizes."""
        value, again = given[name], other[name]
        norm = self.state.get(given.get("running_mean", node))
        if norm is not None and name in ("training", "momentum"):
            return self._of_norm(norm.rpartition(".")[0], name, value)
        if name not in SIZE_ARGUMENTS:
            return self._merged(node, value, again)
        label = f"{node.name}_{name}"
        if type(value) is int and value == again:
            return self._attribute(label, value) if 0 < value < ENDLESS else value
        if not isinstance(value, (list, tuple)) or len(value) != len(again):
            return self._merged(node, value, again)
        return self._size_list(node, label, value, again)

    def _size_list(self, node: Node, label: str, value: Sequence[Any], again: Sequence[Any]) -> Any:
        """A list of sizes: those that are equal in both graphs become one attribute, a list."""
        if operator_name(node.target) in RESHAPING:
            value, again = self._with_rest(node, list(value), list(again))
        fixed = [a for a, b in zip(value, again, strict=True) if type(a) is int and a == b]
        if max(fixed, default=0) <= 1:
            return self._merged(node, value, again)
        held = self._attribute(label, fixed)
        if len(fixed) == len(value):
            return held
        entries, number = [], 0
        for a, b in zip(value, again, strict=True):
            if type(a) is int and a == b:
                entries.append(self.graph.call_function(operator.getitem, (held, number)))
                number += 1
            else:
                entries.append(self._merged(node, a, b))
        return entries

    def _with_rest(self, node: Node, sizes: list[int], others: list[int]) -> tuple[list[int], list[int]]:
        """The one size that grows with the samples as -1, so that it follows whatever else it counts.

        A size that is the number of samples itself counts nothing else, and is left to `_merged`.
        """
        grows = [k for k, (a, b) in enumerate(zip(sizes, others, strict=True)) if a != b]
        if len(grows) != 1 or sizes[grows[0]] == self.traced.samples:
            return sizes, others
        if -1 in sizes:
            first = arguments(node)["dim"] % len(shape(node.args[0])) if "sizes" in named(node) else 0
            left = sizes.index(-1)
            known, again = shape(node)[first + left], shape(self.twins[node])[first + left]
            if known != again:
                return sizes, others
            sizes[left] = others[left] = known
        sizes[grows[0]] = others[grows[0]] = -1
        return sizes, others

    def _merged(self, node: Node, a: Any, b: Any) -> Any:
        """A value that is equal in both graphs, or a linear function of the number of samples."""
        if isinstance(a, Node) and self.twins[a] is b:
            return self.copies[a]
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return type(a)(self._merged(node, x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, torch.device) and a == b == self.device:
            held = (self.batch, "device")
            return self._once("device", lambda: self.graph.call_function(getattr, held))
        if type(a) is type(b) and (a == b or (a != a and b != b)):  # NaN is not equal to itself
            return a
        if type(a) is not int or type(b) is not int or self.other.samples == self.traced.samples:
            self._refuse(node, f"the number of samples turns {a} into {b}")
        slope = (b - a) // (self.other.samples - self.traced.samples)
        offset = a - slope * self.traced.samples
        size = self._once("samples", lambda: self.graph.call_method("size", (self.batch, 0)))
        if slope != 1:
            size = self.graph.call_function(operator.mul, (size, slope))
        return self.graph.call_function(operator.add, (size, offset)) if offset else size

    def _once(self, name: str, make: Callable[[], Node]) -> Node:
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def _attribute(self, name: str, value: Any) -> Node:
        """A new attribute of the sizes, and the node that reads it."""
        setattr(self.sizes, name, value)
        sizes = self._once("sizes", lambda: self.graph.get_attr(self.name))
        return self.graph.create_node("call_function", getattr, (sizes, name), name=name)

    def _of_norm(self, path: str, name: str, value: Any) -> Any:
        """A batch norm's `training` or `momentum`, read from its module, where users set it."""
        if name == "training" and value != self.training:
            return value
        if name == "momentum":
            self.momenta[path] = value
        return self.graph.get_attr(f"{path}.{name}".lstrip("."))

    def _source(self) -> str:
        """The graph's Python source, each call with the user's place as a comment."""
        lines = self.graph.python_code("self").src.splitlines()
        for k, line in enumerate(lines):
            made = re.match(r"\s+(\w+) = ", line)
            if made and made[1] in self.places:
                lines[k] = f"{line}  # at {self.places[made[1]]}"
        return "\n".join(lines) + "\n"


def named(node: Node) -> dict[str, Any]:
    """The arguments that a call passes, by the names of its operator's schema, without defaults."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def spelled_out(node: Node) -> tuple[Any, dict[str, Any]]:
    """A call's operator and arguments, such that it computes the same where widths are cut.

    A split into equal parts becomes one by sizes, `narrow` a slice, and attention gets the scale that it
    would compute from its width.
    """
    name, given = operator_name(node.target), named(node)
    source = next(iter(given.values()), None)
    fixed = not any(isinstance(value, Node) for value in list(given.values())[1:])
    if name in SPLITTING and fixed:
        dim = arguments(node)["dim"]
        sizes = [part.shape[dim] for part in node.meta["val"]]
        by_sizes = {"self": source, "split_sizes": sizes, "dim": dim}
        return torch.ops.aten.split_with_sizes.default, by_sizes
    if name == "narrow" and fixed:
        start = given["start"] % shape(source)[given["dim"]]
        bounds = {"start": start, "end": start + given["length"]}
        return torch.ops.aten.slice.Tensor, {"self": source, "dim": given["dim"], **bounds}
    if name == "scaled_dot_product_attention" and given.get("scale") is None:
        given["scale"] = shape(given["query"])[-1] ** -0.5
    return node.target, given
