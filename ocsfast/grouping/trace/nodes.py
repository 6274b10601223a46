"""One node of a traced graph: its operator, its arguments, its shape, and where the user wrote it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

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


def written(node: Node) -> list[tuple[Node, int]]:
    """The tensors that the operator changes and returns, each with the number of that result."""
    if not writes(node):
        return []
    schema = node.target._schema  # type: ignore[union-attr]
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
    `add.Scalar` is not. One tag speaks for all overloads, and for the same operator in place.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = str(target.overloadpacket.__name__)
    packets = {name} if name.startswith("_") else {name, name.rstrip("_")}
    space = getattr(torch.ops, target.namespace)
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags
        for packet in (getattr(space, known, None) for known in packets)
        if packet is not None
        for overload in packet.overloads()
    )


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor; () for anything else."""
    value = node.meta.get("val") if isinstance(node, Node) else node
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def module_of(node: Node) -> str:
    """The qualified name of the innermost module whose forward pass made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path)  # torch writes "@1" behind the second call of one module


def source_of(node: Node) -> str:
    """file:line of the user's statement that made the node; its module where no line is known."""
    stack = node.meta.get("stack_trace") or ""
    # A model from `as_graph` runs a generated program, whose lines end with the user's own place.
    noted = re.findall(r"  # at (.+:\d+)$", stack, re.MULTILINE)
    if noted:
        return str(noted[-1])
    where = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return f"{where[-1][0]}:{where[-1][1]}" if where else module_of(node) or "the model's forward"
