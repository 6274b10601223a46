"""The reference of the proof: the whole model's graph, whose averages leave the pruned groups out.

So do extremes, and what a softmax shares out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ocsfast.core.families import Families, kept_indices
from ocsfast.grouping.proof.arithmetic import GROUPED_MM, bent, doubled, grouped_mm
from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.nodes import COMPOSED, by_name, operator_name

NORMS = ("layer_norm", "group_norm", "rms_norm", "batch_norm")


class Reference(torch.fx.Interpreter):
    """Runs a traced graph of the whole model on state whose pruned slices are zero.

    Zeros change nothing but averages, extremes and what a softmax shares out. Those run over the kept
    indices here, as in the cut model; what a softmax gives a pruned index is zero. A norm
    applies its affine parameters to all indices afterwards: were they cut too, a wrong label on them
    would go unseen.

    Args:
        trace: the graph.
        training: whether it is of the training mode.
        families: the model's.
        pruned: [num_groups] bool.
    """

    def __init__(self, trace: Trace, training: bool, families: Families, pruned: Tensor) -> None:
        super().__init__(trace.graph)
        self._kept: dict[str, dict[int, Tensor]] = {}  # node -> averaged dimension -> kept indices
        for s in families.statistics:
            if s.training == training:
                self._kept.setdefault(s.node, {})[s.dim] = kept_indices(s.groups, pruned)

    def run_node(self, n: torch.fx.Node) -> Any:
        name = operator_name(n.target) if n.op == "call_function" else ""
        if name == "_assert_tensor_metadata":
            return None  # it asserts the dtypes of the trace, and this run is in float64
        kept = self._kept.get(n.name)
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = doubled(self.fetch_args_kwargs_from_env(n))
        if name in GROUPED_MM:
            return grouped_mm(*args, **kwargs)
        if name == "relu" and COMPOSED not in n.meta:  # the cut module bends no relu inside an operator
            return bent(args[0], in_place=str(n.target).startswith("aten.relu_"))
        if name == "_weight_norm":  # a row of zeros has no direction: 0 / 0
            return torch.nan_to_num(self.call_function(n.target, args, kwargs))
        if kept is None:
            return self.call_function(n.target, args, kwargs)
        if name in NORMS:
            return _norm_over(name, by_name(n.target, args, kwargs), *kept.values())
        part = args[0]
        for dim, indices in kept.items():
            part = part.index_select(dim, indices.to(part.device))
        out = self.call_function(n.target, (part, *args[1:]), kwargs)
        return _filled(out, n.meta["val"], kept) if isinstance(out, Tensor) else out


def _filled(part: Tensor, whole: Any, kept: dict[int, Tensor]) -> Tensor:
    """A result that has only the kept indices, as that of a softmax has, with zeros for the others."""
    for dim, indices in kept.items() if part.dim() == whole.dim() else ():
        if dim < part.dim() and part.shape[dim] == len(indices) != whole.shape[dim]:
            sizes = [*part.shape]
            sizes[dim] = whole.shape[dim]
            part = part.new_zeros(sizes).index_copy_(dim, indices.to(part.device), part)
    return part


def _norm_over(name: str, given: dict[str, Any], kept: Tensor) -> Tensor:
    """A norm with statistics over the indices in `kept`; before the affine part the others are zero.

    Args:
        name: of the operator, one of NORMS.
        given: its arguments by name.
        kept: 1-d int64, along the dimension that the statistics run over.
    """
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    dim = 1 if name == "group_norm" else -1
    kept = kept.to(x.device)
    part = x.index_select(dim, kept)
    if name == "batch_norm":  # a standardized weight: every row over the inputs that are left
        part = F.batch_norm(part, None, None, training=True, eps=given["eps"])
    elif name == "group_norm":
        part = F.group_norm(part, 1, eps=given["eps"])
    elif name == "layer_norm":
        part = F.layer_norm(part, (len(kept),), eps=given["eps"])
    else:
        part = F.rms_norm(part, (len(kept),), eps=given["eps"])
    out = torch.zeros_like(x).index_copy_(dim, kept, part)
    shape = (-1, *[1] * (x.dim() - 2)) if name in ("group_norm", "batch_norm") else (-1,)
    if weight is not None:
        out = out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)
