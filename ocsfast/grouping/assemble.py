"""From solved labels to families: the last step of grouping."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ocsfast.grouping.families import Attribute, Axis, Families, Family, Frozen, Product
from ocsfast.grouping.labels import Labels, Vector
from ocsfast.grouping.propagate import Findings, RawProduct

# A plan's matrices have rows and columns, and one slice a row or column.
MAX_AXES = 2


def assemble(found: Findings, parameters: Mapping[str, Tensor], samples: int) -> Families:
    """Number the atoms that are left, family by family, and write down where each one lives."""
    labels = found.labels
    simplify(found)
    axes = [
        (name, axis, labels.settled(vector))
        for name, dims in found.state.items()
        for axis, vector in enumerate(dims)
        if labels.live(vector) and vector is not None
    ]
    order = _families(found, axes, parameters)
    number: dict[int, int] = {}
    for members in order:
        for atom in members:
            number[atom] = len(number)

    def numbered(vector: Vector | None) -> Tensor | None:
        if vector is None:
            return None
        terms = labels.terms(vector)
        groups = [number.get(next(iter(term)), -1) if len(term) == 1 else -1 for term in terms]
        return torch.tensor(groups, dtype=torch.int64) if max(groups, default=-1) >= 0 else None

    labelled = [(name, axis, numbered(vector)) for name, axis, vector in axes]
    records = tuple(Axis(name, axis, groups) for name, axis, groups in labelled if groups is not None)
    counted = ((path, name, numbered(v)) for (path, name), v in found.attributes.items())
    return Families(
        families=_named(order, number, found, records),
        axes=records,
        attributes=tuple(Attribute(path, name, g) for path, name, g in counted if g is not None),
        macs=tuple(_product(raw, numbered, samples) for raw in found.products),
        frozen=_frozen(found, records, parameters),
    )


def simplify(found: Findings) -> None:
    """Freeze what the plan's tables cannot say: composite indices, third axes, threefold costs."""
    labels = found.labels
    for name, dims in found.state.items():
        for axis, vector in enumerate(dims):
            if axis >= MAX_AXES:
                labels.freeze(vector, f"axis {axis} of {name} is neither its rows nor its columns")
    for raw in found.products:
        live = [vector for vector in raw.vectors if labels.live(vector)]
        for vector in live[: -MAX_AXES or None] if len(live) > MAX_AXES else ():
            labels.freeze(vector, f"{raw.where}: its cost is a product of more than two widths")
    vectors = [vector for dims in found.state.values() for vector in dims]
    for vector in (
        *vectors,
        *found.attributes.values(),
        *(v for raw in found.products for v in raw.vectors),
    ):
        if vector is None:
            continue
        while composite := [term for term in set(labels.terms(vector)) if len(term) > 1]:
            # A channel of a grouped convolution is (group, position within it): whole groups stay
            # prunable, positions do not.
            inner = {atom for term in composite for atom in term if labels.is_inner(atom)}
            spare = inner or {max(term) for term in composite}
            labels.freeze_atoms(spare, "an index that belongs to two groups at once")


def _families(
    found: Findings, axes: list[tuple[str, int, Vector]], parameters: Mapping[str, Tensor]
) -> list[list[int]]:
    """Atoms that live on the same axes, equally often, in the order in which they appear."""
    places: dict[int, list[tuple[int, int]]] = {}
    weighs: set[int] = set()  # atoms with a slice that saliency can see
    for position, (name, _, vector) in enumerate(axes):
        terms, counts = np.unique(vector, return_counts=True)
        first_seen = np.argsort([int(np.argmax(vector == term)) for term in terms])
        for k in first_seen.tolist():
            for atom in found.labels.terms(terms[k : k + 1])[0]:
                places.setdefault(atom, []).append((position, int(counts[k])))
                if name in parameters and not name.endswith("bias"):
                    weighs.add(atom)
    families: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for atom, where in places.items():
        if atom in weighs:
            families.setdefault(tuple(where), []).append(atom)
    # Where a family has one group it can never lose it.
    return [members for members in families.values() if len(members) > 1]


def _named(
    order: list[list[int]], number: dict[int, int], found: Findings, records: tuple[Axis, ...]
) -> tuple[Family, ...]:
    """A family is called after the first layer that produces it; every producer counts in Eq. 3."""
    first_group = [number[members[0]] for members in order]
    producers: list[dict[str, None]] = [{} for _ in order]
    holders: list[dict[str, None]] = [{} for _ in order]
    for record in records:
        layer = record.tensor.rpartition(".")[0] or record.tensor
        present = torch.isin(torch.tensor(first_group), record.groups)
        for f in torch.nonzero(present).flatten().tolist():
            holders[f][layer] = None
            if (record.tensor, record.axis) in found.producers:
                producers[f][layer] = None
    families = []
    for f, members in enumerate(order):
        layers = tuple(producers[f] or list(holders[f])[:1])
        families.append(Family(layers[0], first_group[f], len(members), layers))
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
    whole, rest = divmod(coefficient, samples)
    return Product(coefficient if rest else whole, rows, cols, raw.where)


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
    frozen += [
        Frozen(name, "not used in the traced forward pass")
        for name in parameters
        if name not in found.used
    ]
    return tuple(frozen)


def reasons_of(labels: Labels, vector: Vector) -> list[str]:
    """At most three reasons; a long list tells a person nothing."""
    reasons = labels.reasons(vector)
    return [*reasons[:3], f"and {len(reasons) - 3} more"] if len(reasons) > 3 else reasons
