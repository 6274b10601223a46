"""One node of a traced graph: its operator, its arguments, its shape, and where the user wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Node = torch.fx.Node
COMPOSED = "ocsfast_composed"  # key of the metadata of a node that stands for a part of an operator


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
    return by_name(node.target, node.args, node.kwargs)


def by_name(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema, with defaults filled in."""
    given = {}
    for n, argument in enumerate(operator._schema.arguments):
        if n < len(args):
            given[argument.name] = args[n]
        else:
            given[argument.name] = kwargs.get(argument.name, argument.default_value)
    return given


def writes(node: Node) -> bool:
    """Whether the operator changes a tensor that is passed to it."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def written(node: Node) -> list[tuple[Node, int]]:
    """The tensors that the operator changes and returns, each with the number of that result.

    `x.transpose_(0, 1)` changes no entry of x, and the graph goes on with its result.
    """
    target: Any = node.target
    if not writes(node) or torch.Tag.inplace_view in target.tags:
        return []
    schema = target._schema
    given, found = arguments(node), []
    for place, result in enumerate(schema.returns):
        for argument in schema.arguments:
            info, other = result.alias_info, argument.alias_info
            same = info is not None and other is not None and info.before_set & other.before_set
            if same and other.is_write and isinstance(given[argument.name], Node):
                found.append((given[argument.name], place))
    return found


@cache
def is_pointwise(target: Any) -> bool:
    """Whether an operator works element by element, on operands that broadcast.

    torch tags overloads, and not all of them: `gelu` is tagged and `gelu_` is not, `add.Tensor` is and
    `add.Scalar` is not. A tag speaks for the other overloads that ask for the same arguments, and for
    the same operator in place: not for `max(x)`, of which `max(x, other)` is tagged.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise in target.tags:
        return True
    name = str(target.overloadpacket.__name__)
    plain = re.sub(r"^__i(?!n)", "__", name) if name.startswith("_") else name.rstrip("_")
    space = getattr(torch.ops, target.namespace)
    return any(
        torch.Tag.pointwise in known.tags and _required(known) == _required(target)
        for packet in (target.overloadpacket, getattr(space, plain, None))
        if packet is not None
        for known in (getattr(packet, overload) for overload in packet.overloads())
    )


def _required(target: Any) -> list[str]:
    """The names of the arguments that a call has to give, but for tensors to write into."""
    every = target._schema.arguments
    return [a.name for a in every if not a.has_default_value() and not a.is_out]


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
