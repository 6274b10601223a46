"""Run an exported graph on labels instead of numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.errors import ConfigError
from ocsfast.grouping.deadline import Deadline
from ocsfast.grouping.labels import Dims, Labels, Vector
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.shapes import sizes_of
from ocsfast.grouping.trace.export import Trace, module_of, source_of
from ocsfast.grouping.trace.origins import origins_of

Value = Dims | list[Any] | None  # a tensor's labels, a list of them, or nothing


@dataclass(frozen=True, eq=False)
class RawProduct:
    """A cost before the labels are final: coefficient * the kept sizes of these dimensions."""

    coefficient: int
    vectors: tuple[Vector | None, ...]
    sizes: tuple[int, ...]
    where: str
    batched: bool  # whether it depends on the inputs, and so grows with the number of samples


@dataclass(eq=False)
class Findings:
    """What the walk over one or several graphs of a model collects."""

    labels: Labels = field(default_factory=Labels)
    state: dict[str, Dims] = field(default_factory=dict)  # labels of each parameter and float buffer
    producers: dict[tuple[str, int], None] = field(default_factory=dict)  # (tensor, axis), in order
    # What a module's integer attribute counts; None where it counts what never goes.
    attributes: dict[tuple[str, str], Vector | None] = field(default_factory=dict)
    read: set[tuple[str, str]] = field(default_factory=set)  # attributes that a graph's code used
    # Labels of what a module's own code makes.
    made: dict[str, list[Vector]] = field(default_factory=dict)
    # Whether of the graph in training mode, node, dim, its labels.
    statistics: list[tuple[bool, str, int, Vector]] = field(default_factory=list)
    kinds: dict[str, list[Vector]] = field(default_factory=dict)  # labels known to be of a kind
    products: list[RawProduct] = field(default_factory=list)
    unknown: dict[str, str] = field(
        default_factory=dict
    )  # place of an operator without a rule: its name
    used: set[str] = field(default_factory=set)
    multiple: int = 1  # of which the kept counts have to be, for some operator's sake


class Walk:
    """One graph, node by node. Rules receive it as their context."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        found: Findings,
        *,
        count: bool,
        outputs: Collection[int] | None = None,
        training: bool = False,
        alone: bool = False,
        deadline: Deadline | None = None,
    ) -> None:
        self.model = model
        self.trace = trace
        self.training = training
        self.alone = alone  # whether this is the only graph, the other mode's being unknown
        self.found = found
        self.labels = found.labels
        self.count = count  # whether this graph's operators are what one sample costs
        self.outputs = outputs  # numbers of those that keep their shape; None: all
        self.deadline = deadline
        self.values: dict[torch.fx.Node, Value] = {}
        self.batched: set[torch.fx.Node] = set()  # what depends on the inputs
        self.names: dict[torch.fx.Node, str] = {}  # placeholders that are parameters or buffers
        self._canonical = _canonical_names(model)

    def run(self) -> None:
        self.found.read |= self.trace.read
        position = 0
        for node in self.trace.graph.graph.nodes:
            if any(source in self.batched for source in node.all_input_nodes) or self._per_sample(node):
                self.batched.add(node)
            if node.op == "placeholder":
                if position >= len(self.trace.state):
                    self.batched.add(node)
                self.values[node] = self._state(node, position)
                position += 1
            elif node.op == "output":
                for number, out in enumerate(node.args[0]):
                    if isinstance(out, torch.fx.Node) and (
                        self.outputs is None or number in self.outputs
                    ):
                        self._leaves(number, out)
            elif node.target is operator.getitem:
                source = self.values.get(node.args[0])
                self.values[node] = source[node.args[1]] if isinstance(source, list) else None
            elif node.op == "call_function":
                if self.deadline is not None:
                    self.deadline.check(f"at {source_of(node)}")
                name = operator_name(node.target)
                rule = RULES.get(name)
                if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                    rule = RULES["pointwise"]
                if rule is not None and (name in COUNTED or name in SIZED or self._is_live(node)):
                    self.values[node] = rule(self, node, arguments(node))
                else:
                    self._without_rule(node, name)
                self.found.made.setdefault(module_of(node), []).extend(self.flat(node))
                if self.alone and not node.users and not writes(node):
                    self.freeze_all(node, "computed but not returned, and the other mode is not known")

    def _leaves(self, number: int, out: torch.fx.Node) -> None:
        """What the model returns keeps its shape, and so does what its pass leaves behind of the inputs.

        What it leaves of the parameters alone, as old weight_norm does, is made anew by the next pass.
        """
        returned = len(self.trace.outputs)
        if number < returned:
            self.freeze_all(out, "model output" + " in training" * self.training)
        elif out in self.batched:
            self.freeze_all(out, f"left behind in {self.trace.left[number - returned]}")

    def _per_sample(self, node: torch.fx.Node) -> bool:
        """Whether a tensor is made for as many samples as another one has."""
        return any(
            dim == 0 and other in self.batched and shape(other)[:1] == (self.trace.samples,)
            for other, dim in sizes_of(node).values()
        )

    def _state(self, node: torch.fx.Node, position: int) -> Value:
        """Fresh atoms for every axis of a parameter or float buffer; inputs and constants have none."""
        if position >= len(self.trace.state) or self.trace.state[position] is None:
            return None
        name = self._canonical[str(self.trace.state[position])]
        self.names[node] = name
        if node.users:
            self.found.used.add(name)
        if name not in self.found.state:
            tensor: Tensor = node.meta["val"]
            live = tensor.is_floating_point()
            # An axis of one index can never shrink, and would tie what it broadcasts against.
            self.found.state[name] = tuple(
                self.labels.fresh(size) if live and size > 1 else None for size in tensor.shape
            )
        return self.found.state[name]

    def _is_live(self, node: torch.fx.Node) -> bool:
        return any(
            self.labels.live(vector) for source in node.all_input_nodes for vector in self.flat(source)
        )

    def _without_rule(self, node: torch.fx.Node, name: str) -> None:
        """Nothing that flows into an unknown operator may ever be removed."""
        if self.count:
            macs = _count_macs(node)
            if macs:
                batched = node in self.batched
                self.found.products.append(RawProduct(macs, (), (), module_of(node), batched))
        if name in HARMLESS or not self._is_live(node):
            return
        where = source_of(node)
        self.found.unknown[where] = spoken(name)
        for source in node.all_input_nodes:
            self.freeze_all(source, f"no rule for {spoken(name)} ({where})")

    # -- what rules use ---------------------------------------------------------------------------

    def dims(self, node: Any) -> Dims:
        """The labels of a tensor argument, one entry a dimension."""
        value = self.values.get(node)
        return value if isinstance(value, tuple) else (None,) * len(shape(node))

    def flat(self, node: torch.fx.Node) -> list[Vector]:
        """Every vector that a node's value carries."""
        stack: list[Any] = [self.values.get(node)]
        vectors = []
        while stack:
            value = stack.pop()
            if isinstance(value, (list, tuple)):
                stack.extend(value)
            elif value is not None:
                vectors.append(value)
        return vectors

    def freeze_all(self, node: torch.fx.Node, reason: str) -> None:
        for vector in self.flat(node):
            self.labels.freeze(vector, reason)

    def reason(self, node: torch.fx.Node) -> str:
        """Why a rule freezes something: the operator and where it stands."""
        return f"{spoken(operator_name(node.target))} ({source_of(node)})"

    def produces(self, weight: Any, axis: int) -> None:
        """Axis `axis` of a weight holds the channels that a layer produces."""
        if weight in self.names:
            self.found.producers[(self.names[weight], axis)] = None

    def attribute(self, node: torch.fx.Node, weight: Any, name: str, vector: Vector | None) -> None:
        """An integer attribute of the weight's module, or of the one that runs, counts this vector."""
        if vector is None:
            return
        owner = self.names.get(weight, "").rpartition(".")[0]
        for path in dict.fromkeys((module_of(node), owner)):
            value = getattr(self.model.get_submodule(path), name, None)
            last = value[-1] if isinstance(value, tuple) and value else value
            if isinstance(last, int) and last == vector.size:
                self._counts((path, name), vector, self.reason(node))

    def sized(self, node: torch.fx.Node, position: int, vector: Vector | None, size: int) -> None:
        """The size at this position of the call's arguments is `size` and counts these indices.

        Where the model's code passed a module's attribute, that attribute has to follow them.
        """
        origin = origins_of(node).get(position)
        if origin is not None and origin[2] == size:
            self._counts(origin[:2], vector, self.reason(node))

    def counted(self, node: torch.fx.Node, vector: Vector | None, size: int) -> None:
        """As `sized`, wherever in the arguments it stands: one attribute alone has this value there."""
        named = {origin[:2] for origin in origins_of(node).values() if origin[2] == size}
        if len(named) == 1:
            self._counts(named.pop(), vector, self.reason(node))

    def _counts(self, attribute: tuple[str, str], vector: Vector | None, reason: str) -> None:
        """One number can only count dimensions that shrink together."""
        known = self.found.attributes
        if attribute not in known:
            known[attribute] = vector
            return
        before = known[attribute]
        if before is not None and vector is not None and before.size != vector.size:
            return
        self.labels.unify(before, vector, reason)
        known[attribute] = vector if before is None else before

    def statistic(self, node: torch.fx.Node, dim: int, vector: Vector | None) -> None:
        """The operator averages over dimension `dim` of its input, which has these labels."""
        if vector is not None:
            self.found.statistics.append((self.training, node.name, dim, vector))

    def kind(self, name: str, vector: Vector | None) -> None:
        """These indices are heads, say: see `families.KINDS`."""
        if vector is not None:
            self.found.kinds.setdefault(name, []).append(vector)

    def product(
        self,
        node: torch.fx.Node,
        coefficient: int,
        vectors: Sequence[Vector | None],
        sizes: Sequence[int],
    ) -> None:
        """The operator costs coefficient * the product of these sizes, in MACs of the whole batch."""
        if self.count:
            batched = node in self.batched
            self.found.products.append(
                RawProduct(coefficient, tuple(vectors), tuple(sizes), module_of(node), batched)
            )


Node = torch.fx.Node
Rule = Callable[[Walk, Node, dict[str, Any]], Value]
RULES: dict[str, Rule] = {}  # by the operator's name


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what operators of these names say about labels.

    A rule gets the walk (for labels and costs), the node and its arguments by name, and returns the
    labels of the result. An operator without one freezes what flows in: dense, never wrong.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def register_rule(*operators: str) -> Callable[[Rule], Rule]:
    """Teach grouping an operator of your own, or another rule for one that it knows.

    The rule gets the walk, the node and the operator's arguments by name, and returns the labels of the
    result, one vector (or None: it never shrinks) a dimension; a list of these where it has several
    results. `docs/grouping.md` has the algebra and an example. Without a rule, an operator freezes what
    flows into it.

    Args:
        operators: names as torch has them, e.g. "mylib::scale". All overloads share the rule.

    Raises:
        ConfigError: torch knows no such operator.
    """
    names = []
    for full in operators:
        space, _, name = full.partition("::")
        if not name or not hasattr(getattr(torch.ops, space), name):
            raise ConfigError(
                f"register_rule({full!r}): torch has no such operator; a name is namespace::name"
            )
        names.append(name if space == "aten" else full)
    return rule(*names)


def freeze(walk: Walk, vectors: Sequence[Vector | None], why: str) -> None:
    for vector in vectors:
        walk.labels.freeze(vector, why)


# Operators that make a tensor of one value, or draw each of its elements alike.
FACTORIES = (
    *("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("rand", "randn", "randint"),
)
# Operators whose sizes alone may tie their result to another tensor.
SIZED = (*FACTORIES, "expand", "repeat")
# Operators whose rule also states a cost, so that they run even where no label is live.
COUNTED = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "einsum"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"}
)
HARMLESS = frozenset({"_assert_tensor_metadata", "sym_size", "sym_numel", "sym_stride", "size", "numel"})


def operator_name(target: Any) -> str:
    """`aten.add_.Tensor` -> `add`, `mylib.scale.default` -> `mylib::scale`.

    In-place forms share the rule of the plain one.
    """
    name = str(getattr(target, "_opname", getattr(target, "__name__", target)))
    name = name if name.startswith("_") else name.rstrip("_")
    space = getattr(target, "namespace", "aten")
    return name if space in ("aten", "prims", "prim") else f"{space}::{name}"


def spoken(name: str) -> str:
    """An operator's name for people."""
    return name if "::" in name else f"aten.{name}"


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The operator's arguments by the names of its schema, defaults filled in."""
    target: Any = node.target
    given = {}
    for n, argument in enumerate(target._schema.arguments):
        if n < len(node.args):
            given[argument.name] = node.args[n]
        else:
            given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


def writes(node: Node) -> bool:
    """Whether the operator changes a tensor that it is given."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor; () for anything else."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else node
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor (tied ones share it)."""
    first: dict[int, str] = {}
    names = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _count_macs(node: torch.fx.Node) -> int:
    """MACs of an operator without a rule, by torch's own counter, on tensors without data."""
    computes = isinstance(node.meta.get("val"), (Tensor, tuple, list))
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or not computes:
        return 0
    if not node.all_input_nodes:  # it makes a tensor, drawn perhaps: nothing to count, or to run
        return 0

    def meta(value: Any) -> Any:
        if not isinstance(value, torch.fx.Node):
            return value
        known = value.meta.get("val")
        return known.to("meta") if isinstance(known, Tensor) else known

    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), meta)
    target: Any = node.target
    try:
        with torch.no_grad():
            return count_macs(lambda: target(*args, **kwargs))
    except Exception:  # no meta implementation: then it is none of the counted operators
        return 0
