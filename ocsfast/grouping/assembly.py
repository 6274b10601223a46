"""The last step of grouping: families, made of the solved labels and numbered."""

from __future__ import annotations

from collections import Counter
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
    Operation,
    Product,
    Statistic,
)
from ocsfast.grouping.findings import Findings, RawOperation, RawProduct
from ocsfast.grouping.labels import FROZEN, Labels, Term, Vector
from ocsfast.grouping.unread_sizes import Numbering, unread_sizes

# A plan takes every tensor for a matrix: a row or a column can be in a slice, an index of a third axis
# cannot. Likewise a cost is a coefficient times at most two kept sizes.
MAX_AXES = 2

LabelledAxis = tuple[str, int, Vector]  # tensor, axis, solved labels


def assemble(
    found: Findings, model: nn.Module, samples: int, kinds: Collection[str] = KINDS
) -> Families:
    """Number the terms that may go, family by family, and write down where each one lives.

    Args:
        found: what the graphs say. Labels that no family can use are frozen in it.
        model: whose graphs these are.
        samples: how many samples the costs are of.
        kinds: groups of other kinds stay dense.
    """
    parameters = dict(model.named_parameters())
    _freeze_excluded(found, kinds)
    solution = simplify(found)
    axes = [
        (name, axis, solution[vector])
        for name, dims in found.state.items()
        for axis, vector in enumerate(dims)
        if vector is not None
    ]
    kind_of = _kind_of(found, solution)
    members = []  # the terms of each family
    for terms in _families(found.labels, axes, parameters):
        if kind_of(terms[0]) in kinds:
            members.append(terms)
        else:
            found.labels.freeze(np.array(terms), f"kinds= leaves {kind_of(terms[0])} out")
    numbered = _numbering(solution, members)
    labelled = [(name, axis, numbered(vector)) for name, axis, vector in axes]
    records = tuple(Axis(name, axis, groups) for name, axis, groups in labelled if groups is not None)
    counted = ((path, name, numbered(v)) for (path, name), v in found.attributes.items())
    sure, unsure = unread_sizes(model, found, numbered)
    averaged = ((mode, node, dim, numbered(v)) for mode, node, dim, v in found.statistics)
    named = _named([len(terms) for terms in members], found, records)
    return Families(
        families=tuple(replace(f, kind=kind_of(m[0])) for f, m in zip(named, members, strict=True)),
        axes=records,
        attributes=(*(Attribute(path, name, g) for path, name, g in counted if g is not None), *sure),
        macs=tuple(_product(raw, numbered, samples) for raw in found.products),
        frozen=_frozen(found, records, parameters),
        statistics=tuple(Statistic(n, d, g, mode) for mode, n, d, g in averaged if g is not None),
        multiple=found.multiple,
        unsure=tuple(unsure),
        operations=_operations(found.operations, numbered),
    )


def _freeze_excluded(found: Findings, kinds: Collection[str]) -> None:
    """Freeze groups of kinds that the user leaves out, and tensors that no traced operator reads."""
    for kind in ("head", "head_dim", "width"):
        if kind not in kinds:
            for marked in found.kinds.get(kind, ()):
                found.labels.freeze(marked, f"kinds= leaves {kind} out")
    for name, dims in found.state.items():
        if name not in found.used:  # other code may use it, on shapes that the trace does not show
            for vector in dims:
                found.labels.freeze(vector, NOT_USED)


def simplify(found: Findings) -> Vector:
    """Freeze what the plan's tables cannot hold: third axes, costs of three widths, composite indices.

    Returns:
        `Labels.solution()`, in which every term that occurs has one atom at most.
    """
    labels = found.labels
    spare = {number for vector in found.spare for number in labels.settled(vector).tolist()} - {FROZEN}

    def is_spare(vector: Vector | None) -> bool:
        return vector is not None and not spare.isdisjoint(labels.settled(vector).tolist())

    for name, dims in found.state.items():
        live = [(axis, vector) for axis, vector in enumerate(dims) if labels.live(vector)]
        if len(live) > MAX_AXES:
            live.sort(key=lambda entry: is_spare(entry[1]))
        for axis, vector in live[MAX_AXES:]:
            labels.freeze(vector, f"axis {axis} of {name}: two others shrink already")
    for raw in found.products:
        live_factors = [vector for vector in raw.vectors if labels.live(vector)]
        if len(live_factors) > MAX_AXES:
            live_factors.sort(key=is_spare, reverse=True)
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
        first = _first_to_stay(labels, composite, spare)
        labels.freeze_atoms(first, "an index that belongs to two groups at once")


def _first_to_stay(labels: Labels, composite: list[Term], spare: set[int]) -> set[int]:
    """Atoms of indices that belong to two groups at once: without these, each belongs to one.

    What a softmax or an extreme runs over stays first, such as the branches of split attention, so that
    channels may go. Then places in groups and heads, so that these may go whole. Elsewhere the atom in
    most terms: the knots of splines rather than the inputs, since there is one of each for every input.
    """
    atoms = {atom for term in composite for atom in term}
    alone = {next(iter(term)) for term in map(labels.term, spare) if len(term) == 1}
    inner = {atom for atom in atoms if labels.is_inner(atom)}
    uses = Counter(atom for term in composite for atom in term)
    most = {max(term, key=lambda atom: (uses[atom], atom)) for term in composite}
    return (atoms & alone) or inner or most


def _kind_of(found: Findings, solution: Vector) -> Callable[[int], str]:
    """A function from a solved term to its kind of group; "neuron" where no rule named one."""
    known = {
        kind: set(np.unique(solution[np.concatenate(vectors)]).tolist())
        for kind, vectors in found.kinds.items()
    }

    def kind_of(term: int) -> str:
        return next((kind for kind in KINDS if term in known.get(kind, ())), "neuron")

    return kind_of


def _numbering(solution: Vector, members: list[list[int]]) -> Numbering:
    """A function from a label vector to the group of each index, -1 where it stays.

    Groups are numbered in the order of `members`. The function returns None for a vector without any.
    """
    group_of_term = np.full(solution.size, -1, dtype=np.int64)
    terms = [number for family in members for number in family]
    group_of_term[terms] = np.arange(len(terms))

    def numbered(vector: Vector | None) -> Tensor | None:
        if vector is None:
            return None
        groups = group_of_term[solution[vector]]
        return torch.from_numpy(groups) if groups.max(initial=-1) >= 0 else None

    return numbered


def _families(
    labels: Labels, axes: list[LabelledAxis], parameters: Mapping[str, Tensor]
) -> list[list[int]]:
    """The terms that live on the same axes equally often, in the order in which they appear.

    A term with no slice but in biases is left out, because saliency could not see it; so is a family of
    one group, which could never lose it.
    """
    places: dict[int, list[tuple[int, int]]] = {}  # of each term: (number of the axis, how often)
    visible: set[int] = set()  # terms with a slice that saliency sees
    for position, (name, _, vector) in enumerate(axes):
        terms, first, counts = np.unique(vector, return_index=True, return_counts=True)
        for k in np.argsort(first).tolist():
            if labels.term(int(terms[k])):
                places.setdefault(int(terms[k]), []).append((position, int(counts[k])))
        if name in parameters and not name.endswith("bias"):
            visible.update(terms.tolist())
    families: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for term, where in places.items():
        if term in visible:
            families.setdefault(tuple(where), []).append(term)
    return [members for members in families.values() if len(members) > 1]


def _named(sizes: list[int], found: Findings, records: tuple[Axis, ...]) -> tuple[Family, ...]:
    """The families of these sizes, each named after the first layer that produces it.

    Where no layer does, it is named after the first that holds it.
    """
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


def _product(raw: RawProduct, numbered: Numbering, samples: int) -> Product:
    """A cost of one sample, with dimensions that never shrink multiplied into the coefficient."""
    coefficient, axes = raw.coefficient, []
    for vector, size in zip(raw.vectors, raw.sizes, strict=True):
        groups = numbered(vector)
        if groups is None:
            coefficient *= size
        else:
            axes.append(groups)
    rows, cols = (*axes, None, None)[:MAX_AXES]
    per_sample = -(-coefficient // samples) if raw.batched else coefficient  # rounded up
    return Product(per_sample, rows, cols, raw.where)


def _operations(raws: list[RawOperation], numbered: Numbering) -> tuple[Operation, ...]:
    """The operators of the graph; tensors with the same labels share one vector of groups."""
    known: dict[int, Tensor | None] = {}

    def shared(vector: Vector | None) -> Tensor | None:
        if id(vector) not in known:
            known[id(vector)] = numbered(vector)
        return known[id(vector)]

    return tuple(
        Operation(
            raw.node,
            raw.operator,
            raw.where,
            raw.shapes,
            tuple(tuple(shared(vector) for vector in dims) for dims in raw.vectors),
        )
        for raw in raws
    )


def _frozen(
    found: Findings, records: tuple[Axis, ...], parameters: Mapping[str, Tensor]
) -> tuple[Frozen, ...]:
    """Why output channels stay, one entry a layer; operators without rules; parameters without use."""
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
    """The first three reasons why indices are frozen, and how many more there are."""
    reasons = labels.reasons(vector)
    return [*reasons[:3], f"and {len(reasons) - 3} more"] if len(reasons) > 3 else reasons
