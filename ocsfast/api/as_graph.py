"""`as_graph`: a model in whose place its own traced graph runs, so that more of it may be cut."""

from __future__ import annotations

from torch import nn

from ocsfast.api.arguments import Inputs, plain, require_whole, unpacked
from ocsfast.grouping.graph.model import GraphModel, graph_of


def as_graph(model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """The same model, run from the graphs of its forward pass.

    Where a model's code fixes a width (a literal in a `view`, the equal halves of `chunk(2)`, the
    asserts of `nn.MultiheadAttention`), the layers around it stay dense. A traced graph has no such
    code: every size in it is an integer attribute that the cut can set.

    Use the result in the model's place. It has the same parameters and buffers, the same objects under
    the same names, so an optimizer or a state dict of the model fits it. `ocsfast.step`, `inspect`,
    `save` and `load` take it like any model; a saved file is loaded into `as_graph` of a fresh model.

    It runs at any batch size. Other sizes (an image's height, a sequence's length) are those of the
    example wherever the model's code computed with them. Hooks, methods and the classes of the layers
    stay behind; batch norms keep their `momentum` and `training`.

    Args:
        model: a module that `torch.export` takes in both modes, on any device. A compiled or replicated
            model is unwrapped; the result of an earlier `as_graph` is returned as it is.
        example_inputs: one batch, of any size and dtype that the model takes: a tensor, a tuple of
            arguments, or a dict of keyword arguments. Dim 0 is the batch.

    Returns:
        A module that takes arguments of the example's form and returns what the model returns. Its
        sizes lie in the submodules `graph_train` and `graph_eval`.

    Raises:
        ConfigError: `model` is no module, or the inputs hold no tensor.
        GroupingError: the model cannot be exported, enters autocast by itself, branches on the number of
            samples, holds what cannot be pruned, or its graph does not compute what it computes.
        StateError: the model is sharded or wrapped, or a buffer holds NaN.

    Examples:
        >>> import torch, ocsfast
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> x = torch.randn(2, 5, 16)  # [batch, length, width]
        >>> graph = ocsfast.as_graph(layer, x)
        >>> graph.linear1.weight is layer.linear1.weight
        True
        >>> graph(torch.randn(7, 5, 16)).shape
        torch.Size([7, 5, 16])
    """
    own = plain(model)
    args, kwargs = unpacked(example_inputs)
    if not isinstance(own, GraphModel):
        require_whole(own)
    return graph_of(own, args, kwargs)
