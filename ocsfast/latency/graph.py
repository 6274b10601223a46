"""The operators of a model's forward pass as the example inputs run them: shapes, strides, dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError
from ocsfast.core.families import Families, Operation
from ocsfast.grouping.composed import spell_out
from ocsfast.grouping.trace.export import Trace, trace
from ocsfast.grouping.trace.nodes import Node, writes
from ocsfast.grouping.trace.side_effects import undisturbed
from ocsfast.grouping.trace.trees import hidden


@dataclass(frozen=True)
class Layout:
    """What memory a tensor has."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool = False  # whether it is the model's, and not made in the pass

    @classmethod
    def of(cls, tensor: Tensor, parameter: bool = False) -> Layout:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, parameter)


@dataclass(frozen=True, eq=False)
class Site:
    """One call of an operator, as the example inputs run it.

    Attributes:
        operation: its record among the families.
        node: of the graph that was traced with the example as it is; its arguments are plain values and
            nodes for tensors.
        tensors: the layout of each tensor among the arguments, each once.
        results: the same of the tensors that it makes.
        free: whether it only views what it is given.
        writes: whether it writes into one of its arguments.
    """

    operation: Operation
    node: Node
    tensors: tuple[Layout, ...]
    results: tuple[Layout, ...]
    free: bool
    writes: bool


def sites_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], families: Families
) -> list[Site]:
    """Run a model once in evaluation mode, and note every operator in `families.operations`.

    Raises:
        GroupingError: it cannot be traced with the example as it is, or runs other operators then.
    """
    traced = trace(model, args, kwargs, training=False, samples=None)
    spell_out(traced.graph)
    nodes = {node.name: node for node in traced.graph.graph.nodes if node.op == "call_function"}
    operations = {operation.node: operation for operation in families.operations}
    for name, operation in operations.items():
        found = nodes.get(name)
        if found is None or str(found.target) != operation.operator:
            raise GroupingError(
                f"with the {traced.samples} samples of example_inputs the model runs other operators "
                f"than with the few that it was traced with ({operation.operator} in "
                f"{operation.where or 'the model'}): its latency cannot be told from these"
            )
    return _Observer(traced, operations).run(model, args, kwargs)


class _Observer(torch.fx.Interpreter):
    """Runs a graph on the model's own weights and the example, and notes what each operator gets."""

    def __init__(self, traced: Trace, operations: dict[str, Operation]) -> None:
        super().__init__(traced.graph)
        self._traced, self._operations = traced, operations
        self._sites: list[Site] = []
        self._state: set[Node] = set()

    def run(  # type: ignore[override]
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Site]:
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors.update(model.named_buffers(remove_duplicate=False))
        traced = self._traced
        state = [
            traced.constants[n] if name is None else tensors[name] for n, name in enumerate(traced.state)
        ]
        placeholders = [n for n in traced.graph.graph.nodes if n.op == "placeholder"]
        self._state = set(placeholders[: len(state)])
        with undisturbed(model, training=False, real=True), torch.no_grad():
            # What the graph writes to is a copy.
            held = [t.detach().clone(memory_format=torch.preserve_format) for t in state]
            super().run(*held, *pytree.tree_leaves(hidden((args, kwargs))))
        return self._sites

    def run_node(self, n: Node) -> Any:
        operation = self._operations.get(n.name)
        if operation is None:
            return super().run_node(n)
        given = [(node, self.env[node]) for node in n.all_input_nodes]
        before = [(node, x) for node, x in given if isinstance(x, Tensor)]
        layouts = tuple(Layout.of(x, node in self._state) for node, x in before)
        result = super().run_node(n)
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        places = {x.untyped_storage().data_ptr() for _, x in before}
        free = not writes(n) and all(x.untyped_storage().data_ptr() in places for x in made)
        results = tuple(map(Layout.of, made))
        self._sites.append(Site(operation, n, layouts, results, free, writes(n)))
        return result
