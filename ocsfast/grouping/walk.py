"""What a rule works with: the labels of its operator's arguments, and the means to say what it means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ocsfast.grouping.findings import Findings, RawProduct
from ocsfast.grouping.labels import Dims, Vector
from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.nodes import Node, module_of, operator_name, shape, source_of, spoken
from ocsfast.grouping.trace.origins import origins_of
from ocsfast.grouping.trace.shapes import Place

Value = Dims | list[Any] | None  # a tensor's labels, a list of them for several results, or none at all


class Walk:
    """One graph, run on labels instead of numbers. Each rule gets it as its first argument.

    Args:
        model: the model.
        trace: its graph.
        found: where findings go.
        count: whether the operators of this graph are what the model costs.
        training: whether the graph is of the training mode.

    Attributes:
        labels: where terms are equated, frozen, merged and split.
        values: the labels of every node so far.
        batched: the nodes that depend on the inputs, and so grow with the number of samples.
        names: the nodes that are parameters or buffers, with their first names.
        found: everything that was found so far, also in the model's other graph.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, found: Findings, *, count: bool, training: bool = False
    ) -> None:
        self.model = model
        self.trace = trace
        self.found = found
        self.labels = found.labels
        self.count = count
        self.training = training
        self.values: dict[Node, Value] = {}
        self.batched: set[Node] = set()
        self.names: dict[Node, str] = {}

    # -- labels -----------------------------------------------------------------------------------

    def dims(self, node: Any) -> Dims:
        """The labels of a tensor argument, one entry a dimension."""
        value = self.values.get(node)
        return value if isinstance(value, tuple) else (None,) * len(shape(node))

    def flat(self, node: Node) -> list[Vector]:
        """Every label vector in a node's value, of all its results and dimensions."""
        stack: list[Any] = [self.values.get(node)]
        vectors = []
        while stack:
            value = stack.pop()
            if isinstance(value, (list, tuple)):
                stack.extend(value)
            elif value is not None:
                vectors.append(value)
        return vectors

    def freeze(self, vectors: Iterable[Vector | None], reason: str) -> None:
        """These dimensions keep all their indices."""
        for vector in vectors:
            self.labels.freeze(vector, reason)

    def freeze_all(self, node: Node, reason: str) -> None:
        """All dimensions of a node's value keep all their indices."""
        self.freeze(self.flat(node), reason)

    def give_up(self, node: Node) -> Value:
        """The rule does not know this form of the operator: what flows in keeps all its indices."""
        for source in node.all_input_nodes:
            self.freeze_all(source, self.reason(node))
        return None

    def reason(self, node: Node) -> str:
        """The operator and the user's line: what a rule passes as the reason for a freeze."""
        return f"{spoken(operator_name(node.target))} ({source_of(node)})"

    def held(self, name: str, size: int) -> Vector:
        """The labels of a parameter or buffer of one dimension, also of one that no operator reads.

        Args:
            name: its first name.
            size: of its dimension.
        """
        self.found.used.add(name)
        known = self.found.state.get(name, (None,))[0]
        if known is None:
            known = self.labels.fresh(size)
            self.found.state[name] = (known,)
        return known

    # -- what dimensions are ----------------------------------------------------------------------

    def produces(self, weight: Any, axis: int) -> None:
        """Axis `axis` of this weight holds the output channels of a layer."""
        if weight in self.names:
            self.found.producers[(self.names[weight], axis)] = None

    def kind(self, name: str, vector: Vector | None) -> None:
        """These indices are groups of this kind, one of `families.KINDS`."""
        if vector is not None:
            self.found.kinds.setdefault(name, []).append(vector)

    def statistic(self, node: Node, dim: int, vector: Vector | None) -> None:
        """The operator runs over those indices of dimension `dim` of its input that are left.

        An average does, an extreme, a softmax. `vector` has the labels of that dimension.
        """
        if vector is not None:
            self.found.statistics.append((self.training, node.name, dim, vector))

    def spare(self, vector: Vector | None) -> None:
        """Where a tensor has more axes that could shrink than a plan can hold, these stay first."""
        if vector is not None:
            self.found.spare.append(vector)

    def product(
        self,
        node: Node,
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

    # -- what modules' attributes count -----------------------------------------------------------

    def attribute(self, node: Node, weight: Any, name: str, vector: Vector | None) -> None:
        """The attribute `name` counts these indices: of the weight's module, and of the running one.

        Nothing is noted for a module where the attribute is missing or has another value.
        """
        if vector is None:
            return
        owner = self.names.get(weight, "").rpartition(".")[0]
        for path in dict.fromkeys((module_of(node), owner)):
            value = getattr(self.model.get_submodule(path), name, None)
            last = value[-1] if isinstance(value, tuple) and value else value
            if isinstance(last, int) and last == vector.size:
                self._counts((path, name), vector, self.reason(node))

    def sized(self, node: Node, place: Place, vector: Vector | None, size: int) -> None:
        """The integer at this place of the call (see `origins_of`) is `size`: it counts these indices.

        Where the model's code passed a module's attribute there, the attribute has to follow them.
        """
        origin = origins_of(node).get(place)
        if origin is not None and origin[2] == size:
            self._counts(origin[:2], vector, self.reason(node))

    def counted(self, node: Node, vector: Vector | None, size: int) -> None:
        """As `sized`, at whatever place, where just one attribute among the arguments has this value.

        The integers of a subscript are not looked at: each of them belongs to one dimension.
        """
        numbered = ((place, origin) for place, origin in origins_of(node).items() if type(place) is int)
        named = {origin[:2] for _, origin in numbered if origin[2] == size}
        if len(named) == 1:
            self._counts(named.pop(), vector, self.reason(node))

    def _counts(self, attribute: tuple[str, str], vector: Vector | None, reason: str) -> None:
        """Note what an attribute counts. One number can only count dimensions that shrink together."""
        known = self.found.attributes
        if attribute not in known:
            known[attribute] = vector
            return
        before = known[attribute]
        if before is not None and vector is not None and before.size != vector.size:
            return
        self.labels.unify(before, vector, reason)
        known[attribute] = vector if before is None else before


def per_result(node: Node, dims: Dims) -> Value:
    """The same labels for each result of an operator: a list where it has several results."""
    value = node.meta["val"]
    return [dims] * len(value) if isinstance(value, (list, tuple)) else dims
