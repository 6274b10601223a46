"""Sizes that the traced forward pass never read, but other code of the module may.

A block that is re-parameterised for inference builds its layer from `groups` or `in_channels`; another
splits by `self.c`, but only in its export path. Such an attribute has to follow the cut like any size,
and since no trace shows what it counts, its name and its value have to tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ocsfast.core.families import Attribute
from ocsfast.cut.sizes import size_attributes
from ocsfast.grouping.findings import Findings
from ocsfast.grouping.labels import Vector

# Ends of the names of widths. An attribute with another name, a stride or a number of heads, may equal
# a width by chance; so may "width" itself, which is often an image's.
WIDTHS = re.compile(
    r"(^|_)(c|ch|chs|chans?|channels?|planes|inplanes|dims?|features?|filters?|groups|units"
    r"|d|nf|embd?|(hidden|embed|embedding|intermediate)(_size)?)[0-9]*(_(in|out))?$"
)
# Names of widths between two layers, which no tensor of the module's own code need have.
WITHIN = re.compile(r"mid|hidden|inner|inter|expan|reduc|squeez|bottle|mlp|ffn")

Numbering = Callable[[Vector | None], Tensor | None]  # the groups along a dimension; None: it stays
SizedAxis = tuple[int, Tensor | None]  # the size of an axis, and its groups


def unread_sizes(
    model: nn.Module, found: Findings, numbered: Numbering
) -> tuple[list[Attribute], list[Attribute]]:
    """The attributes that count a width of their module for sure, and those that may count one.

    An attribute is a candidate if it has the size of an axis that shrinks, among the parameters of the
    module and its submodules; if no traced operator took it; and if it is no attribute of a layer of
    torch's own. It counts a width for sure if its name says width and one set of groups alone fits.

    Args:
        model: whose attributes.
        found: what the graphs say.
        numbered: from labels to groups.

    Returns:
        Sure attributes with what they count; unsure ones with all groups on the axes of their size.
    """
    sure: list[Attribute] = []
    unsure: list[Attribute] = []
    axes: dict[str, list[SizedAxis]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dims = found.state.get(name) or (None,) * tensor.dim()
        axes[name] = [(n, numbered(vector)) for n, vector in zip(tensor.shape, dims, strict=True)]
    known = found.read | found.attributes.keys()
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        prefix = f"{path}." if path else ""
        below: list[list[SizedAxis]] | None = None
        for name, size in _candidates(module, path, known):
            if below is None:
                below = [dims for tensor, dims in axes.items() if tensor.startswith(prefix)]
            every = [groups for dims in below for n, groups in dims if n == size]
            live = [groups for groups in every if groups is not None]
            if not live:
                continue
            made = (numbered(v) for v in found.made.get(path, ()) if v.size == size)
            counted = _counted(name, size, below, [groups for groups in made if groups is not None])
            if counted is not None and WIDTHS.search(_plain(name)):
                sure.append(Attribute(path, name, counted, read=False))
            else:
                unsure.append(Attribute(path, name, torch.unique(torch.cat(live)), read=False))
    return sure, unsure


def _candidates(module: nn.Module, path: str, known: set[tuple[str, str]]) -> list[tuple[str, int]]:
    """The module's integer attributes above 1 that are not known and that torch does not define."""
    of_torch = {n for base in type(module).__mro__ for n in vars(base).get("__constants__", ())}
    return [
        (name, size)
        for name, size in size_attributes(module).items()
        if size >= 2
        and not name.startswith("_")
        and _plain(name) not in of_torch
        and (path, name) not in known
    ]


def _plain(name: str) -> str:
    """The attribute that an entry of a sequence belongs to: "splits[1]" -> "splits"."""
    return name.partition("[")[0]


def _counted(
    name: str, size: int, below: list[list[SizedAxis]], made: Sequence[Tensor]
) -> Tensor | None:
    """The one set of groups that an attribute of this name and size counts; None where several fit.

    Args:
        name, size: of the attribute.
        below: the axes of each tensor in the module and its submodules.
        made: the groups along dimensions of this size in tensors that the module's own code makes.
    """
    counted = _only([groups for dims in below for n, groups in dims if n == size])
    if counted is not None:
        return counted
    if name.startswith(("in_", "out_")):  # the inputs, or the outputs, of the layers inside
        axis = int(name.startswith("in_"))
        matrices = (dims[axis] for dims in below if len(dims) > 1)
        return _only([groups for n, groups in matrices if n == size])
    return None if WITHIN.search(_plain(name)) else _only(made)


def _only(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """The set of groups that all vectors hold, in whatever order; None where they differ."""
    first = vectors[0] if vectors else None
    if first is None:
        return None
    ordered = first.sort().values
    same = (v is not None and torch.equal(v.sort().values, ordered) for v in vectors)
    return first if all(same) else None
