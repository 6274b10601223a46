"""One node of a traced graph: its operator, its arguments, its shape, and where the user wrote it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

Node = torch.fx.Node


def operator_name(target: Any) -> str:
    """`aten.add_.Tensor` -> `add`, `mylib.scale.default` -> `mylib::scale`.

    An in-place operator has the name of the plain one, so that both have the same rule.
    """
    name = str(getattr(target, "_opname", getattr(target, "__name__", target)))
    name = name if name.startswith("_") else name.rstrip("_")
    space = getattr(target, "namespace", "aten")
    return name if space in ("aten", "prims", "prim") else f"{space}::{name}"


def spoken(name: str) -> str:
    """An operator's name as messages print it: `aten.add`, `mylib::scale`."""
    return name if "::" in name else f"aten.{name}"


def arguments(node: Node) -> dict[str, Any]:
    """The operator's arguments by the names of its schema, with defaults filled in."""
    target: Any = node.target
    given = {}
    for n, argument in enumerate(target._schema.arguments):
        if n < len(node.args):
            given[argument.name] = node.args[n]
        else:
            given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


def writes(node: Node) -> bool:
    """Whether the operator changes a tensor that is passed to it."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor; () for anything else."""
    value = node.meta.get("val") if isinstance(node, Node) else node
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def module_of(node: Node) -> str:
    """The qualified name of the innermost module whose forward pass made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path)  # torch writes "@1" behind the second call of one module


def name_sliced(graph: torch.fx.Graph, model: nn.Module) -> None:
    """Give modules their own names where torch.export names them by a slice of the list they lie in.

    It does so in a model that uses some module in two places, an activation say: "blocks.slice(1, None,
    None).0" is "blocks.1". A slice of a Sequential keeps its entries' names, one of a ModuleList counts
    anew.
    """
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any("slice(" in path for path, *_ in stack.values()):
            node.meta["nn_module_stack"] = {
                key: (_unsliced(model, path), *rest) for key, (path, *rest) in stack.items()
            }


def _unsliced(model: nn.Module, path: str) -> str:
    names: list[str] = []
    kept: range | None = None  # the entries of the list so far that a slice has left
    for part in re.findall(r"slice\(.*?\)|[^.]+", re.sub(r"@\d+", "", path)):
        holder: Any = model.get_submodule(".".join(names))
        if part.startswith("slice("):
            bounds = (None if bound == "None" else int(bound) for bound in part[6:-1].split(", "))
            kept = (range(len(holder)) if kept is None else kept)[slice(*bounds)]
            continue
        counted = kept is not None and isinstance(holder, nn.ModuleList)
        names.append(str(kept[int(part)]) if counted and kept else part)
        kept = None
    return ".".join(names)


def source_of(node: Node) -> str:
    """file:line of the user's statement that made the node; its module where no line is known."""
    stack = node.meta.get("stack_trace") or ""
    # A model from `as_graph` runs a generated program, whose lines end with the user's own place.
    noted = re.findall(r"  # at (.+:\d+)$", stack, re.MULTILINE)
    if noted:
        return str(noted[-1])
    where = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return f"{where[-1][0]}:{where[-1][1]}" if where else module_of(node) or "the model's forward"
