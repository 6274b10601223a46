"""Sizes that the traced forward pass never read, but other code of the module may.

A block that is re-parameterised for inference builds its layer from `groups` or `in_channels`; another
splits by `self.c` in its export path alone. Such a number has to follow the cut like any size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ocsfast.core.families import Attribute
from ocsfast.cut.sizes import size_attributes
from ocsfast.grouping.labels import Vector
from ocsfast.grouping.propagate import Findings

# What widths are called, at the end of a name. A stride or a number of heads may equal one by chance;
# "width" itself is an image's too.
WIDTHS = re.compile(
    r"(^|_)(c|ch|chs|chans?|channels?|planes|inplanes|dims?|features?|filters?|groups|units"
    r"|d|nf|embd?|(hidden|embed|embedding|intermediate)(_size)?)[0-9]*(_(in|out))?$"
)
# And widths within a module, which what its own code makes need not have.
WITHIN = re.compile(r"mid|hidden|inner|inter|expan|reduc|squeez|bottle|mlp|ffn")

Numbered = Callable[[Vector | None], Tensor | None]


def unread_sizes(
    model: nn.Module, found: Findings, numbered: Numbered
) -> tuple[list[Attribute], list[Attribute]]:
    """The attributes that count a width of their module beyond doubt, and those that may count one.

    An attribute is looked at if it has the size of an axis that shrinks in the module's parameters or
    its submodules', no operator of the trace took it, and no rule of torch's own layers is for it. It
    follows if it is called like a width and one set of groups alone has its size: among all axes there;
    by its name among the layers' inputs or outputs; or among the tensors that the module itself makes.

    Args:
        numbered: the groups along a labelled dimension; None where none may go.

    Returns:
        Attributes with what they count, and attributes with all groups of the axes of their size.
    """
    sure: list[Attribute] = []
    unsure: list[Attribute] = []
    axes: dict[str, list[tuple[int, Tensor | None]]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dims = found.state.get(name) or (None,) * tensor.dim()
        axes[name] = [(n, numbered(vector)) for n, vector in zip(tensor.shape, dims, strict=True)]
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        theirs = {n for base in type(module).__mro__ for n in vars(base).get("__constants__", ())}
        prefix = f"{path}." if path else ""
        below: list[list[tuple[int, Tensor | None]]] | None = None
        for name, size in size_attributes(module).items():
            plain, known = name.partition("[")[0], found.read | found.attributes.keys()
            if size < 2 or plain in theirs or (path, name) in known:
                continue
            if below is None:
                below = [dims for tensor, dims in axes.items() if tensor.startswith(prefix)]
            every = [groups for dims in below for n, groups in dims if n == size]
            live = [groups for groups in every if groups is not None]
            if not live:
                continue
            counted = _only(every)
            if counted is None and name.startswith(("in_", "out_")):
                axis = int(name.startswith("in_"))
                matrices = (dims[axis] for dims in below if len(dims) > 1)
                counted = _only([groups for n, groups in matrices if n == size])
            elif counted is None and not WITHIN.search(plain):
                made = (numbered(v) for v in found.made.get(path, ()) if v.size == size)
                counted = _only([groups for groups in made if groups is not None])
            if counted is not None and WIDTHS.search(plain):
                sure.append(Attribute(path, name, counted, read=False))
            else:
                unsure.append(Attribute(path, name, torch.unique(torch.cat(live)), read=False))
    return sure, unsure


def _only(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """The one set of groups that all vectors hold, in whatever order; None where they differ."""
    first = vectors[0] if vectors else None
    if first is None:
        return None
    ordered = first.sort().values
    same = (v is not None and torch.equal(v.sort().values, ordered) for v in vectors)
    return first if all(same) else None
