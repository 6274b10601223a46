"""The table of rules: what each operator says about the labels that flow through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ocsfast.core.errors import ConfigError
from ocsfast.grouping.trace.nodes import Node
from ocsfast.grouping.walk import Value, Walk

Rule = Callable[[Walk, Node, dict[str, Any]], Value]
RULES: dict[str, Rule] = {}  # by `operator_name`


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators of these names (see `operator_name`).

    A rule gets the walk, the node and the operator's arguments by name, and returns the labels of the
    result. An operator without a rule freezes what flows in: unknown means dense, never wrong.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def register_rule(*operators: str) -> Callable[[Rule], Rule]:
    """Teach grouping an operator of your own, or replace the rule of an operator that it knows.

    A rule says which indices of an operator's operands and results must disappear together. Grouping
    calls it as `rule(walk, node, args)` once for each call of the operator:

    * `walk` gives and equates labels. `walk.dims(args["x"])` is a tuple with one label vector for each
      dimension of x; a vector is None where no index of the dimension ever goes.
      `walk.labels.unify(a, b, walk.reason(node))` says that two dimensions of equal size go together,
      index by index; `walk.labels.freeze(a, walk.reason(node))` that a dimension keeps all its indices.
    * `node` is the operator's `torch.fx.Node`; `node.meta["val"]` has its result's shape and dtype.
    * `args` holds the arguments by the names of the operator's schema, defaults filled in; those that
      are tensors are nodes.

    It returns the labels of the result, a tuple with one vector or None for each dimension, and a list
    of such tuples for an operator of several results. `docs/grouping.md` lists what else a walk offers,
    and explains the algebra.

    Without a rule an operator freezes what flows into it. A wrong rule is found by the numerical proof,
    which leaves dense what the rule labelled, unless `verify=False`.

    Args:
        operators: names as torch has them, "mylib::scale". All overloads and in-place forms share the
            rule. Of an aten operator, "aten::relu", it replaces ours.

    Returns:
        A decorator, which returns the rule unchanged.

    Raises:
        ConfigError: torch knows no such operator. It has to be defined before its rule.

    Examples:
        >>> import torch, ocsfast
        >>> @torch.library.custom_op("mylib::scale_rows", mutates_args=())
        ... def scale_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ...     return x * scale[:, None]
        >>> @ocsfast.register_rule("mylib::scale_rows")  # x [rows, columns], scale [rows]
        ... def scale_rows_rule(walk, node, args):
        ...     (rows, columns), (scale,) = walk.dims(args["x"]), walk.dims(args["scale"])
        ...     walk.labels.unify(rows, scale, walk.reason(node))  # row k goes with scale k
        ...     return (rows, columns)
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
