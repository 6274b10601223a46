"""The four models of the benchmarks, as a plan bound to weights that lie one behind the other.

Weights, gradients and momenta are views of three flat tensors: a flat read, or a flat
read-modify-write, of the very same memory is then the roof that a kernel is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torchvision
from torch import Tensor, nn

from ocsfast.choice.budget import Aim
from ocsfast.choice.ranking import make_ranking
from ocsfast.choice.targets import parameter_products
from ocsfast.core.families import Axis, Families, Family
from ocsfast.grouping.engines import group
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import CostModel, build_cost_model
from ocsfast.ops.plan import Plan
from ocsfast.ops.planning import build_plan
from ocsfast.train.models import build_model

# A cache line, which is what a processor fetches when it touches one element.
LINE = 64


@dataclass(frozen=True, eq=False)
class Case:
    """A model's coupled weights with gradients and momenta, and half of its cost marked to go."""

    name: str
    model: nn.Module | None
    example: Tensor | None
    families: Families
    plan: Plan
    bound: ops.Bound
    flat: Tensor
    flat_grad: Tensor
    flat_momentum: Tensor
    grads: list[Tensor]
    momenta: list[Tensor]
    cost_model: CostModel
    limits: Tensor
    budget: Tensor

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.flat.element_size()

    @cached_property
    def squares(self) -> list[Tensor]:
        """Moving averages of the gradients' squares, one behind the other like the rest; for AdamW."""
        flat = torch.full_like(self.flat, 1e-6)
        sizes = [w.numel() for w in self.bound.weights]
        return [
            part.view(w.shape) for part, w in zip(flat.split(sizes), self.bound.weights, strict=True)
        ]

    @cached_property
    def every(self) -> Tensor:
        return torch.ones(self.plan.count("groups"), dtype=torch.bool, device=self.flat.device)

    @cached_property
    def half(self) -> Tensor:
        """The groups that go where half of the cost has to."""
        scores, _ = ops.group_saliency(self.bound)
        return ops.partition(self.plan, self.cost_model, scores, self.limits, self.budget)[0]

    def touched(self, mask: Tensor) -> int:
        """Bytes of the cache lines that hold an element of a pruned slice."""
        pruned = torch.cat(
            [mask.cpu()[self.plan.table("slice_group").long().cpu()], torch.zeros(1).bool()]
        )
        row_slice, col_slice = (
            self.plan.table("row_slice").cpu().long(),
            self.plan.table("col_slice").cpu().long(),
        )
        lines = 0
        for weight, (rows, cols, inner, _, row_base, col_base) in zip(
            self.bound.weights, self.plan.shapes.tolist(), strict=True
        ):
            if row_base < 0 and col_base < 0:
                continue
            of_row = torch.zeros(rows, dtype=torch.bool)
            of_col = torch.zeros(cols, dtype=torch.bool)
            if row_base >= 0:
                of_row = pruned[row_slice[row_base : row_base + rows]]
            if col_base >= 0:
                of_col = pruned[col_slice[col_base : col_base + cols]]
            per_line = LINE // weight.element_size()
            row = of_col.repeat_interleave(inner)
            row = nn.functional.pad(row, (0, -len(row) % per_line)).view(-1, per_line).any(1)
            whole = len(row)
            lines += int(of_row.sum()) * whole + int((~of_row).sum()) * int(row.sum())
        return lines * LINE


def make_case(
    name: str,
    families: Families,
    shapes: Mapping[str, torch.Size],
    device: str,
    dtype: torch.dtype,
    model: nn.Module | None = None,
    example: Tensor | None = None,
) -> Case:
    """Lay the coupled weights out flat and bind a plan to them."""
    coupled = build_plan(
        families, {n: torch.empty(s, dtype=dtype, device="cpu") for n, s in shapes.items()}
    )
    total = sum(shapes[n].numel() for n in coupled.names)
    flats = [torch.empty(total, dtype=dtype, device=device) for _ in range(3)]
    flats[0].normal_(std=0.02)
    flats[1].normal_(std=1e-3)
    flats[2].zero_()
    views: list[dict[str, Tensor]] = [{}, {}, {}]
    start = 0
    for n in coupled.names:
        stop = start + shapes[n].numel()
        for view, flat in zip(views, flats, strict=True):
            view[n] = flat[start:stop].view(shapes[n])
        start = stop
    plan = build_plan(families, views[0])
    products = families.macs or parameter_products(families, views[0])
    cost_model = build_cost_model(families, products, "MACs" if families.macs else "parameters")
    sizes = torch.tensor(families.sizes)
    return Case(
        name,
        model,
        example,
        families,
        plan,
        ops.Bound(plan, [views[0][n] for n in plan.names]),
        *flats,
        [views[1][n] for n in plan.names],
        [views[2][n] for n in plan.names],
        cost_model.to(torch.device(device)),
        (sizes * 3 // 4).to(device),
        torch.tensor(cost_model(sizes) // 2, device=device),
    )


def aim_of(made: Case) -> Aim:
    """Half of the cost, as `ocsfast.selection.choose` takes it."""
    dense = made.cost_model(made.families.sizes)
    ranking = make_ranking(made.families, "none", False)
    limits = tuple(made.limits.tolist())
    units = (1,) * len(limits)
    return Aim(made.cost_model, dense, dense, int(made.budget), limits, 1, units, ranking, True)


def compared(made: Case) -> Callable[[], Tensor]:
    """What a check reads of a partition, beside an earlier one."""
    scores, _ = ops.group_saliency(made.bound)
    found = ops.partition(made.plan, made.cost_model, scores, made.limits, made.budget)
    mask, cost, status = found
    return lambda: ops.compare(made.plan, mask, scores, cost, status, made.every, made.every)


def llama(
    layers: int = 22, width: int = 2048, hidden: int = 5632, heads: int = 32, groups: int = 4
) -> tuple[Families, dict[str, torch.Size]]:
    """Families and shapes of a decoder of 1.1 B parameters (TinyLlama's): residual width, grouped heads
    and neurons; no forward pass."""
    families, axes, shapes, first = [], [], {}, 0
    head = width // heads

    def family(name: str, size: int) -> Tensor:
        nonlocal first
        families.append(Family(name, first, size, (name,)))
        first += size
        return torch.arange(first - size, first)

    def couple(name: str, rows: int, cols: int | None, row: Tensor | None, col: Tensor | None) -> None:
        shapes[name] = torch.Size((rows,) if cols is None else (rows, cols))
        axes.extend(Axis(name, a, g) for a, g in ((0, row), (1, col)) if g is not None)

    residual = family("residual", width)
    couple("embed", 32000, width, None, residual)
    for k in range(layers):
        shared = family(f"{k}.heads", groups)  # a group of queries and their key and value
        queries = shared.repeat_interleave(width // groups)
        keys = shared.repeat_interleave(head)
        neurons = family(f"{k}.neurons", hidden)
        couple(f"{k}.q.weight", width, width, queries, residual)
        couple(f"{k}.k.weight", groups * head, width, keys, residual)
        couple(f"{k}.v.weight", groups * head, width, keys, residual)
        couple(f"{k}.o.weight", width, width, residual, queries)
        couple(f"{k}.gate.weight", hidden, width, neurons, residual)
        couple(f"{k}.up.weight", hidden, width, neurons, residual)
        couple(f"{k}.down.weight", width, hidden, residual, neurons)
        couple(f"{k}.norm1.weight", width, None, residual, None)
        couple(f"{k}.norm2.weight", width, None, residual, None)
    couple("norm.weight", width, None, residual, None)
    couple("head.weight", 32000, width, None, residual)
    return Families(tuple(families), tuple(axes), (), (), ()), shapes


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    if name == "ResNet56":
        return build_model("resnet56", 10, 3), torch.randn(2, 3, 32, 32)
    model = {"ResNet50": torchvision.models.resnet50, "ViT-B/16": torchvision.models.vit_b_16}[name](
        weights=None
    )
    return model, torch.randn(2, 3, 224, 224)


# "name:dtype" is a model whose weights have another dtype than float32.
NAMES = ("ResNet56", "ResNet50", "ResNet50:bfloat16", "ResNet50:float16", "ViT-B/16", "Llama 1.1B")
DECODERS = {
    "Llama 1.1B": {},
    "Llama 0.3B": {"layers": 4},
    "Llama tiny": {"layers": 2, "width": 64, "hidden": 128, "heads": 4, "groups": 2},
}


@lru_cache(maxsize=1)  # of the largest there is room for one
def case(name: str, device: str) -> Case:
    torch.manual_seed(0)
    name, _, of = name.partition(":")
    dtype = getattr(torch, of or "float32")
    if name in DECODERS:
        families, shapes = llama(**DECODERS[name])
        return make_case(name, families, shapes, device, dtype)
    model, example = model_of(name)
    families = group(model, (example,), verify=False)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    return make_case(name, families, shapes, device, dtype, model, example)
