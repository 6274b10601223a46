"""What grouping finds: families of groups, and where each group lives in the model.

Everything after grouping (plan, cost model, cut, checkpoint) reads these records and
nothing else; no record refers to a module or a parameter object, only to names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

# What a group can be: an attention head; a dimension within all heads of a layer; a feature that a layer
# norm runs over, as a transformer's residual width; a convolution's channel; any other feature.
KINDS = ("head", "head_dim", "width", "channel", "neuron")
DEFAULT_KINDS = ("head", "width", "channel", "neuron")


@dataclass(frozen=True)
class Family:
    """Interchangeable groups: they live in the same coupled layers and have one kept count."""

    name: str  # the first layer that produces these channels, e.g. "layer1.0.conv1"
    first: int  # groups first, first + 1, ..., first + size - 1 belong to it
    size: int
    layers: tuple[str, ...]  # every layer whose output channels these are (Eq. 3 counts each once)
    kind: str = "channel"  # one of KINDS


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of one parameter or buffer, with the group of each index along it."""

    tensor: str  # qualified name, as in `model.named_parameters()` or `named_buffers()`
    axis: int
    groups: Tensor  # [size] int64: global group number, or -1 where the index never goes


@dataclass(frozen=True, eq=False)
class Attribute:
    """An integer of a module that counts the kept indices of a labelled dimension.

    `Conv2d.out_channels`, `Linear.in_features`, `LayerNorm.normalized_shape` (whose last entry
    counts), `Conv2d.groups`. The cut sets it to the number of indices that stay.
    """

    module: str
    name: str
    groups: Tensor  # [size] int64, as in `Axis`
    read: bool = True  # whether the traced code used it; else it is found by its size alone


@dataclass(frozen=True, eq=False)
class Product:
    """One summand of a cost: coefficient * kept(rows) * kept(cols).

    `Config.target` may be a function that makes a sequence of these, and of `Lookup`, from `Families`.

    Attributes:
        coefficient: What one row and one column cost together; at least 0.
        rows: The group of each index, or -1 where the index never goes: [size] int64. kept(rows) is how
            many of these stay. None stands for the constant 1.
        cols: The same.
        where: The layer that costs this.

    Examples:
        >>> Product(9, torch.tensor([0, 1, -1]), None, "conv1").coefficient  # 3 channels, 9 weights each
        9
    """

    coefficient: int
    rows: Tensor | None
    cols: Tensor | None
    where: str


@dataclass(frozen=True, eq=False)
class Lookup:
    """One summand of a cost, read from a table of measured values.

    The cost is bilinear interpolation between the four points around (kept(rows), kept(cols)), rounded
    down; beyond an end of a grid it is that of the end. Integers only, and exact: a layer that keeps
    more never costs less.

    Attributes:
        rows: Labels as in `Product`, or None.
        cols: The same.
        row_grid: The counts of kept rows that were measured, ascending, from 1 to 2**20; (1,) where
            `rows` is None.
        col_grid: The same of columns.
        values: What each pair of counts costs, a tuple for each of `row_grid` with one entry for each of
            `col_grid`: integers of at least 0 that never fall along a row or a column. The largest
            values of all lookups sum to 2**53 at most.
        where: The layer that costs this.

    Examples:
        >>> rows = torch.arange(64)  # nanoseconds of a layer with 32 and with 64 rows
        >>> Lookup(rows, None, (32, 64), (1,), ((1000,), (1600,)), "conv1").values[-1][-1]
        1600
    """

    rows: Tensor | None
    cols: Tensor | None
    row_grid: tuple[int, ...]
    col_grid: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]
    where: str


@dataclass(frozen=True, eq=False)
class Statistic:
    """An operator of the traced graph that runs over a labelled dimension of its input.

    An average does, an extreme, a softmax. Where indices go, their share of it goes too: the proof's
    reference has to know.
    """

    node: str
    dim: int
    groups: Tensor  # [size] int64, as in `Axis`
    training: bool = False  # whether of the graph in training mode


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of an operator in the traced graph, with the groups along its tensors' dimensions.

    Its tensors are those among its arguments, each once and in their order, then its results.
    """

    node: str  # its name in the graph
    operator: str  # "aten.conv2d.default"
    where: str  # the module that calls it
    shapes: tuple[tuple[int, ...], ...]  # of the tensors, as traced: with a few samples, not the user's
    # The tensors' dimensions: [size] int64 as in `Axis`, or None where no index ever goes.
    groups: tuple[tuple[Tensor | None, ...], ...]


@dataclass(frozen=True)
class Frozen:
    """Something that stays dense, and why.

    Attributes:
        where: A parameter, a layer or an operator by name.
        reason: Why nothing of it may go, for people.

    Examples:
        >>> str(Frozen("fc", "model output"))
        "Frozen(where='fc', reason='model output')"
    """

    where: str
    reason: str


NOT_USED = "not used in the traced forward pass"


@dataclass(frozen=True, eq=False)
class Families:
    """The structure of a model: what may go, and what goes with it. `ocsfast.group` finds it.

    Attributes:
        families: Each a set of interchangeable groups; their groups are numbered one after the other.
        axes: Each labelled axis of a parameter or buffer, with the group of every index along it.
        attributes: Integers of modules that count indices, as `Linear.in_features`; the cut sets them.
        macs: Multiply-accumulates of one sample's forward pass in evaluation mode, as summands; of the
            whole example's where `notes` says so.
        frozen: What stays dense, and why.
        statistics: Operators that run over all indices, as layer norms do; the proof has to know them.
        multiple: Each kept count is a multiple of this, if any group goes: an operator wants it.
        notes: What a user should know of how these were found.
        unsure: Attributes that may count some of these groups. Nothing proves it: the cut leaves them.
        operations: The operators that a forward pass in evaluation mode calls, in their order; none
            where the model was not traced by labels.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> found = ocsfast.group(model, torch.randn(4, 8))
        >>> found.num_groups, [axis.tensor for axis in found.axes]
        (16, ['0.weight', '0.bias', '2.weight'])
    """

    families: tuple[Family, ...]
    axes: tuple[Axis, ...]
    attributes: tuple[Attribute, ...]
    macs: tuple[Product, ...]
    frozen: tuple[Frozen, ...]
    statistics: tuple[Statistic, ...] = ()
    multiple: int = 1
    notes: tuple[str, ...] = ()
    unsure: tuple[Attribute, ...] = ()
    operations: tuple[Operation, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many groups each family has."""
        return tuple(family.size for family in self.families)

    @property
    def num_groups(self) -> int:
        return sum(self.sizes)

    def family_of_groups(self) -> Tensor:
        """Family number of each group: [num_groups] int64."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.families)), sizes)

    def indices_of_groups(self, labels: Tensor) -> dict[int, int | None]:
        """How many indices of a dimension one group takes, by family; None where its groups differ.

        Args:
            labels: of each index its group, or -1: [size] int64.
        """
        live = labels[labels >= 0]
        each = torch.bincount(live, minlength=self.num_groups)
        found: dict[int, int | None] = {}
        for f in torch.unique(self.family_of_groups()[live]).tolist():
            family = self.families[f]
            counts = each[family.first : family.first + family.size]
            found[f] = int(counts[0]) if bool((counts == counts[0]).all()) else None
        return found

    def cropped(self, pruned: Tensor) -> Families:
        """The families that are left once the groups of `pruned` ([num_groups] bool, CPU) are cut."""
        kept = ~pruned
        # One entry more, so that label -1 reads the last one: an unlabelled index stays unlabelled.
        number = torch.cat([torch.cumsum(kept, 0) - 1, torch.tensor([-1])])
        stays = torch.cat([kept, torch.tensor([True])])

        families, first = [], 0
        for family in self.families:
            size = int(kept[family.first : family.first + family.size].sum())
            families.append(replace(family, first=first, size=size))
            first += size
        return self._relabelled(families, lambda labels: number[labels[stays[labels]]])

    def without(self, refused: Mapping[int, str]) -> Families:
        """The same structure with some families left dense: family number -> why."""
        members = self.family_of_groups()
        stays = ~torch.isin(members, torch.tensor(list(refused)))
        number = torch.where(stays, torch.cumsum(stays, 0) - 1, -1)
        number = torch.cat([number, torch.tensor([-1])])
        families, first = [], 0
        for f, family in enumerate(self.families):
            if f not in refused:
                families.append(replace(family, first=first))
                first += family.size
        left = self._relabelled(families, lambda labels: number[labels])
        named = tuple(Frozen(self.families[f].name, why) for f, why in refused.items())
        return replace(
            left,
            axes=tuple(axis for axis in left.axes if bool((axis.groups >= 0).any())),
            frozen=(*self.frozen, *named),
        )

    def _relabelled(self, families: list[Family], relabel: Callable[[Tensor], Tensor]) -> Families:
        # Operations share most of their labels, as many tensors have the same channels.
        known: dict[int, Tensor] = {}

        def optional(labels: Tensor | None) -> Tensor | None:
            return None if labels is None else relabel(labels)

        def shared(labels: Tensor | None) -> Tensor | None:
            if labels is None:
                return None
            if id(labels) not in known:
                known[id(labels)] = relabel(labels)
            return known[id(labels)]

        def operation(one: Operation) -> Operation:
            groups = tuple(tuple(shared(labels) for labels in dims) for dims in one.groups)
            shapes = tuple(
                tuple(
                    size if labels is None else labels.numel()
                    for size, labels in zip(shape, dims, strict=True)
                )
                for shape, dims in zip(one.shapes, groups, strict=True)
            )
            return replace(one, shapes=shapes, groups=groups)

        return Families(
            families=tuple(families),
            axes=tuple(replace(axis, groups=relabel(axis.groups)) for axis in self.axes),
            attributes=tuple(replace(a, groups=relabel(a.groups)) for a in self.attributes),
            macs=tuple(replace(p, rows=optional(p.rows), cols=optional(p.cols)) for p in self.macs),
            frozen=self.frozen,
            statistics=tuple(replace(s, groups=relabel(s.groups)) for s in self.statistics),
            multiple=self.multiple,
            notes=self.notes,
            unsure=tuple(replace(a, groups=relabel(a.groups)) for a in self.unsure),
            operations=tuple(operation(one) for one in self.operations),
        )


def kept_indices(labels: Tensor, pruned: Tensor) -> Tensor:
    """Positions along a labelled dimension that stay: 1-d int64, ascending."""
    gone = torch.cat([pruned, torch.tensor([False])])  # label -1 reads the last entry
    return torch.nonzero(~gone[labels]).flatten()


def names_match(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module or parameter name, or a module that holds it, matches a shell pattern."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)
