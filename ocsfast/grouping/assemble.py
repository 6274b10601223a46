"""From solved labels to families: the last step of grouping."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ocsfast.core.families import (
    KINDS,
    NOT_USED,
    Attribute,
    Axis,
    Families,
    Family,
    Frozen,
    Product,
    Statistic,
)
from ocsfast.grouping.labels import Labels, Vector
from ocsfast.grouping.propagate import Findings, RawProduct
from ocsfast.grouping.unread import unread_sizes

# A plan's matrices have rows and columns, and one slice a row or column.
MAX_AXES = 2


def assemble(
    found: Findings, model: nn.Module, samples: int, kinds: Collection[str] = KINDS
) -> Families:
    """Number the atoms that are left, family by family, and write down where each one lives.

    Groups of another kind than `kinds` stay dense.
    """
    parameters = dict(model.named_parameters())
    for kind in ("head", "head_dim", "width"):
        if kind not in kinds:
            for marked in found.kinds.get(kind, ()):
                found.labels.freeze(marked, f"kinds= leaves {kind} out")
    for name, dims in found.state.items():
        if name not in found.used:  # other code may use it, on shapes that nobody has seen
            for vector in dims:
                found.labels.freeze(vector, NOT_USED)
    solution = simplify(found)
    axes = [
        (name, axis, solution[vector])
        for name, dims in found.state.items()
        for axis, vector in enumerate(dims)
        if vector is not None
    ]
    kind_of = _kinds(found, solution)
    order = []
    for members in _families(found.labels, axes, parameters):
        if kind_of(members[0]) in kinds:
            order.append(members)
        else:
            why = f"kinds= leaves {kind_of(members[0])} out"
            found.labels.freeze(np.array(members), why)
    group_of_term = np.full(solution.size, -1, dtype=np.int64)
    members = [number for family in order for number in family]
    group_of_term[members] = np.arange(len(members))

    def numbered(vector: Vector | None) -> Tensor | None:
        if vector is None:
            return None
        groups = group_of_term[solution[vector]]
        return torch.from_numpy(groups) if groups.max(initial=-1) >= 0 else None

    labelled = [(name, axis, numbered(vector)) for name, axis, vector in axes]
    records = tuple(Axis(name, axis, groups) for name, axis, groups in labelled if groups is not None)
    counted = ((path, name, numbered(v)) for (path, name), v in found.attributes.items())
    sure, unsure = unread_sizes(model, found, numbered)
    averaged = ((mode, node, dim, numbered(v)) for mode, node, dim, v in found.statistics)
    named = _named([len(family) for family in order], found, records)
    return Families(
        families=tuple(replace(f, kind=kind_of(m[0])) for f, m in zip(named, order, strict=True)),
        axes=records,
        attributes=(*(Attribute(path, name, g) for path, name, g in counted if g is not None), *sure),
        macs=tuple(_product(raw, numbered, samples) for raw in found.products),
        frozen=_frozen(found, records, parameters),
        statistics=tuple(Statistic(n, d, g, mode) for mode, n, d, g in averaged if g is not None),
        multiple=found.multiple,
        unsure=tuple(unsure),
    )


def _kinds(found: Findings, solution: Vector) -> Callable[[int], str]:
    """What kind of group a settled term stands for."""
    known = {
        kind: set(np.unique(solution[np.concatenate(vectors)]).tolist())
        for kind, vectors in found.kinds.items()
    }

    def kind_of(term: int) -> str:
        return next((kind for kind in KINDS if term in known.get(kind, ())), "neuron")

    return kind_of


def simplify(found: Findings) -> Vector:
    """Freeze what the plan's tables cannot say: third axes, threefold costs, composite indices.

    Returns the labels' solution: every term that occurs has at most one atom in it.
    """
    labels = found.labels
    for name, dims in found.state.items():
        live = [(axis, vector) for axis, vector in enumerate(dims) if labels.live(vector)]
        for axis, vector in live[MAX_AXES:]:
            labels.freeze(vector, f"axis {axis} of {name}: two others shrink already")
    for raw in found.products:
        live_factors = [vector for vector in raw.vectors if labels.live(vector)]
        for vector in live_factors[:-MAX_AXES]:
            labels.freeze(vector, f"{raw.where}: its cost is a product of more than two widths")
    vectors = [
        *(vector for dims in found.state.values() for vector in dims),
        *found.attributes.values(),
        *(vector for vectors in found.kinds.values() for vector in vectors),
        *(vector for _, _, _, vector in found.statistics),
        *(vector for raw in found.products for vector in raw.vectors),
    ]
    occurring = np.unique(np.concatenate([v for v in vectors if v is not None] or [np.zeros(1, int)]))
    while True:
        solution = labels.solution()
        terms = [labels.term(number) for number in np.unique(solution[occurring]).tolist()]
        composite = [term for term in terms if len(term) > 1]
        if not composite:
            return solution
        # A channel of a grouped convolution is (group, position within it): whole groups stay
        # prunable, positions do not.
        inner = {atom for term in composite for atom in term if labels.is_inner(atom)}
        spare = inner or {max(term) for term in composite}
        labels.freeze_atoms(spare, "an index that belongs to two groups at once")


def _families(
    labels: Labels, axes: list[tuple[str, int, Vector]], parameters: Mapping[str, Tensor]
) -> list[list[int]]:
    """Terms that live on the same axes, equally often, in the order in which they appear."""
    places: dict[int, list[tuple[int, int]]] = {}
    weighs: set[int] = set()  # terms with a slice that saliency can see
    for position, (name, _, vector) in enumerate(axes):
        terms, first, counts = np.unique(vector, return_index=True, return_counts=True)
        for k in np.argsort(first).tolist():
            if labels.term(int(terms[k])):
                places.setdefault(int(terms[k]), []).append((position, int(counts[k])))
        if name in parameters and not name.endswith("bias"):
            weighs.update(terms.tolist())
    families: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for term, where in places.items():
        if term in weighs:
            families.setdefault(tuple(where), []).append(term)
    # Where a family has one group it can never lose it.
    return [members for members in families.values() if len(members) > 1]


def _named(sizes: list[int], found: Findings, records: tuple[Axis, ...]) -> tuple[Family, ...]:
    """A family is called after the first layer that produces it; every producer counts in Eq. 3."""
    first = [sum(sizes[:f]) for f in range(len(sizes))]
    producers: list[dict[str, None]] = [{} for _ in sizes]
    holders: list[dict[str, None]] = [{} for _ in sizes]
    for record in records:
        layer = record.tensor.rpartition(".")[0] or record.tensor
        present = torch.isin(torch.tensor(first), record.groups)
        for f in torch.nonzero(present).flatten().tolist():
            holders[f][layer] = None
            if (record.tensor, record.axis) in found.producers:
                producers[f][layer] = None
    families = []
    for f, size in enumerate(sizes):
        layers = tuple(producers[f] or list(holders[f])[:1])
        families.append(Family(layers[0], first[f], size, layers))
    return tuple(families)


def _product(
    raw: RawProduct, numbered: Callable[[Vector | None], Tensor | None], samples: int
) -> Product:
    coefficient, axes = raw.coefficient, []
    for vector, size in zip(raw.vectors, raw.sizes, strict=True):
        groups = numbered(vector)
        if groups is None:
            coefficient *= size
        else:
            axes.append(groups)
    rows, cols = (*axes, None, None)[:MAX_AXES]
    # Rounded up where one sample costs no whole number.
    return Product(-(-coefficient // samples) if raw.batched else coefficient, rows, cols, raw.where)


def _frozen(
    found: Findings, records: tuple[Axis, ...], parameters: Mapping[str, Tensor]
) -> tuple[Frozen, ...]:
    """Why a layer's output channels stay, a line a layer; unknown operators; unused parameters."""
    labelled = {(record.tensor, record.axis): record.groups for record in records}
    frozen = []
    for name, axis in found.producers:
        groups = labelled.get((name, axis))
        vector = found.state[name][axis]
        if vector is None or (groups is not None and bool((groups >= 0).all())):
            continue
        why = "; ".join(reasons_of(found.labels, vector)) or "its channels have no weights of their own"
        frozen.append(Frozen(name.rpartition(".")[0] or name, why))
    frozen += [Frozen(where, f"no rule for {name}") for where, name in found.unknown.items()]
    frozen += [Frozen(name, NOT_USED) for name in parameters if name not in found.used]
    return tuple(frozen)


def reasons_of(labels: Labels, vector: Vector) -> list[str]:
    """At most three reasons; a long list tells a person nothing."""
    reasons = labels.reasons(vector)
    return [*reasons[:3], f"and {len(reasons) - 3} more"] if len(reasons) > 3 else reasons
