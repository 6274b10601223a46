"""A traced graph as a program that runs at any batch size, its size literals integers of a module.

In a graph every size that a model's code computed is a number. Here each becomes an attribute of its
own, so that a cut can set it; one that grows with the number of samples is computed from that. What
counts on whole dimensions is spelled out: `chunk` by the sizes of its parts, attention with its scale.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.errors import GroupingError
from ocsfast.cut.sizes import size_attributes
from ocsfast.grouping.propagate import arguments, operator_name, shape
from ocsfast.grouping.trace.export import Trace, source_of
from ocsfast.grouping.trace.origins import origins_of

Node = torch.fx.Node
# Arguments of torch's operators that are sizes of what flows through them.
SIZE_ARGUMENTS = frozenset(
    {"size", "sizes", "shape", "split_sizes", "normalized_shape", "groups", "num_groups"}
    | {"start", "end", "repeats"}
)
RESHAPING = ("view", "reshape", "_unsafe_view", "unflatten")  # they take -1 for what is left
SPLITTING = ("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split")
MOST = 2**62  # what a slice without an end has for one is above


class Sizes(nn.Module):
    """The size literals of one graph, each an attribute, and its constants, which are no model state."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sizes:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                vars(self)[name] = fn(value)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass(frozen=True, eq=False)
class Program:
    source: str  # of a function `forward(self, *inputs)`; a line ends with the user's place
    sizes: Sizes  # what it reads as an attribute of `self`
    momenta: dict[str, float]  # of the batch norms, which it reads from the module of each


def program(traced: Trace, other: Trace, name: str, *, training: bool) -> Program:
    """Write a graph as a program.

    Args:
        traced, other: the model with two numbers of samples; the same where it takes one number only.
        name: what `self` calls the sizes.
        training: the mode it was traced in. A batch norm that followed it has a mode of its own again.

    Raises:
        GroupingError: the two differ by more than sizes that grow with the number of samples, or an
            operator calls other graphs.
    """
    return _Writer(traced, other, name, training).write()


class _Writer:
    """Copies the nodes of a graph one by one, with its twin of another batch size at hand."""

    def __init__(self, traced: Trace, other: Trace, name: str, training: bool) -> None:
        self.traced, self.other, self.name, self.training = traced, other, name, training
        self.sizes = Sizes()
        self.momenta: dict[str, float] = {}
        self.graph = torch.fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.twins: dict[Node, Node] = {}
        self.state: dict[Node, str] = {}  # names of parameters and buffers
        self.places: dict[str, str] = {}  # where the user's code has each copy
        self.batch: Node | None = None  # the first input that holds samples
        self.device: torch.device | None = None  # where that was
        self.shared: dict[str, Node] = {}  # what many operators read

    def write(self) -> Program:
        nodes, others = list(self.traced.graph.graph.nodes), list(self.other.graph.graph.nodes)
        if [(n.op, str(n.target)) for n in nodes] != [(n.op, str(n.target)) for n in others]:
            raise GroupingError(
                f"the model's graph with {self.other.samples} samples is not the one with "
                f"{self.traced.samples}: its code branches on their number"
            )
        self.twins = dict(zip(nodes, others, strict=True))
        given = [node for node in nodes if node.op == "placeholder"]
        for node in given[len(self.traced.state) :]:
            self.copies[node] = self.graph.placeholder(node.name)
            if self.batch is None and shape(node):
                self.batch, self.device = self.copies[node], node.meta["val"].device
        if self.batch is None:
            raise GroupingError("the inputs hold no tensor with samples: pass example inputs that do")
        for number, node in enumerate(given[: len(self.traced.state)]):
            if node.users:
                self.copies[node] = self._held(node, number)
        for node in nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                given, again = self._returned(node), self._returned(self.twins[node])
                self.graph.output(self._merged(node, given, again))
            elif node.op != "placeholder" and node.users:
                self._refuse(node, f"it calls {node.target}, a graph of its own")
        return Program(self._source(), self.sizes, self.momenta)

    def _returned(self, output: Node) -> list[Any]:
        """What the model returns: not what its pass leaves behind besides."""
        every: Any = output.args[0]
        return list(every)[: len(self.traced.outputs)]

    def _refuse(self, node: Node, why: str) -> None:
        raise GroupingError(f"the model's graph cannot stand for it: {why} ({source_of(node)})")

    def _held(self, node: Node, number: int) -> Node:
        """A parameter or buffer by its name; a constant from beside the sizes."""
        name = self.traced.state[number]
        if name is not None:
            self.state[node] = name
            return self.graph.get_attr(name)
        value, again = self.traced.constants[number], self.other.constants[number]
        if value.shape != again.shape or not torch.equal(value, again):
            self._refuse(node, "a constant of it depends on the number of samples")
        return self._attribute(node.name, value.detach().clone())

    def _call(self, node: Node) -> None:
        if operator_name(node.target) == "_assert_tensor_metadata":
            return  # dtypes of the trace
        if node.target is operator.getitem:
            part = (self._merged(node, node.args[0], self.twins[node].args[0]), node.args[1])
            self.copies[node] = self.graph.call_function(operator.getitem, part)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            self._refuse(node, f"it calls {node.target}, no operator of one kernel")
        (target, given), (_, other) = spelled_out(node), spelled_out(self.twins[node])
        if given.get("split_sizes") != other.get("split_sizes"):  # of samples
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
        value, again = given[name], other[name]
        norm = self.state.get(given.get("running_mean", node))
        if norm is not None and name in ("training", "momentum"):
            return self._of_norm(norm.rpartition(".")[0], name, value)
        if name not in SIZE_ARGUMENTS:
            return self._merged(node, value, again)
        label = f"{node.name}_{name}"
        if type(value) is int and value == again:
            return self._attribute(label, value) if 0 < value < MOST else value
        if not isinstance(value, (list, tuple)) or len(value) != len(again):
            return self._merged(node, value, again)
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

        The plain number of samples counts nothing else.
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
        """A value that both graphs share, or that follows the number of samples."""
        if isinstance(a, Node) and self.twins[a] is b:
            return self.copies[a]
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return type(a)(self._merged(node, x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, torch.device) and a == b == self.device:
            held = (self.batch, "device")
            return self._once("device", lambda: self.graph.call_function(getattr, held))
        if type(a) is type(b) and (a == b or (a != a and b != b)):
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
        setattr(self.sizes, name, value)
        sizes = self._once("sizes", lambda: self.graph.get_attr(self.name))
        return self.graph.create_node("call_function", getattr, (sizes, name), name=name)

    def _of_norm(self, path: str, name: str, value: Any) -> Any:
        """Read off the norm's own module, where users and the proof set them."""
        if name == "training" and value != self.training:
            return value
        if name == "momentum":
            self.momenta[path] = value
        return self.graph.get_attr(f"{path}.{name}".lstrip("."))

    def _source(self) -> str:
        lines = self.graph.python_code("self").src.splitlines()
        for k, line in enumerate(lines):
            made = re.match(r"\s+(\w+) = ", line)
            if made and made[1] in self.places:
                lines[k] = f"{line}  # at {self.places[made[1]]}"
        return "\n".join(lines) + "\n"


def named(node: Node) -> dict[str, Any]:
    """The arguments that a call gives, by the names of its operator's schema, in their order."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def spelled_out(node: Node) -> tuple[Any, dict[str, Any]]:
    """A call's operator and arguments; where it counts on whole dimensions, another that does not."""
    name, given = operator_name(node.target), named(node)
    source = next(iter(given.values()), None)
    fixed = not any(isinstance(value, Node) for value in list(given.values())[1:])
    if name in SPLITTING and fixed:
        dim = arguments(node)["dim"]
        sizes = [part.shape[dim] for part in node.meta["val"]]
        return torch.ops.aten.split_with_sizes.default, {
            "self": source,
            "split_sizes": sizes,
            "dim": dim,
        }
    if name == "narrow" and fixed:
        start = given["start"] % shape(source)[given["dim"]]
        bounds = {"start": start, "end": start + given["length"]}
        return torch.ops.aten.slice.Tensor, {"self": source, "dim": given["dim"], **bounds}
    if name == "scaled_dot_product_attention" and given.get("scale") is None:
        given["scale"] = shape(given["query"])[-1] ** -0.5
    return node.target, given


def literals_beyond(model: nn.Module, *traces: Trace) -> bool:
    """Whether a graph that the model runs has size literals that these traces did not come across."""
    held = ((path, module) for path, module in model.named_modules() if isinstance(module, Sizes))
    known = {(path, name) for path, module in held for name in size_attributes(module)}
    return bool(known) and not known <= {
        origin[:2]
        for traced in traces
        for node in traced.graph.graph.nodes
        for origin in origins_of(node).values()
    }
