"""Parts of a model that run in another way while it is traced, and in the copies of the proof."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ocsfast.core.errors import GroupingError

GET_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
# torch is moving this package to another project.
_KINDS = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize")
_quantization = getattr(torch.ao, "quantization", None)
QUANTIZING = tuple(getattr(_quantization, kind).forward for kind in _KINDS if _quantization)


def stand_in(model: nn.Module) -> None:
    """Give such parts a `forward` of their own; whoever calls this takes the attribute away again.

    DataParallel runs as the module inside: no part of a batch goes to another device. Fake quantization,
    which branches on the numbers in two buffers, does what these say now, and observes nothing.
    """
    for name, module in model.named_modules():
        forward: Any = None
        if isinstance(module, nn.DataParallel):
            forward = _inside
        elif type(module).forward in QUANTIZING:
            forward = partial(_quantized, name=name, enabled=bool(module.fake_quant_enabled[0] == 1))
        if forward is not None:
            # A copy of the module binds it to itself.
            vars(module)["forward"] = MethodType(forward, module)


class WrittenData(TorchFunctionMode):
    """While it is entered, `weight.data = weight.data * mask` writes into the weight that is there.

    What `.data` reads is detached, and so part of the graph. torch's own trace sees neither.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == GET_DATA:
            return args[0].detach()
        if func == SET_DATA and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
            with torch.no_grad():
                args[0].detach().copy_(args[1])
            return None
        return func(*args, **(kwargs or {}))


def _inside(replicated: nn.DataParallel[Any], *args: Any, **kwargs: Any) -> Any:
    return replicated.module(*args, **kwargs)


def _quantized(module: Any, x: Tensor, *, name: str, enabled: bool) -> Tensor:
    limits = module.activation_post_process.quant_min, module.activation_post_process.quant_max
    if not enabled:
        return x
    if not module.is_per_channel:
        return torch.fake_quantize_per_tensor_affine(x, module.scale, module.zero_point, *limits)
    axis = module.ch_axis
    if module.scale.numel() != x.shape[axis]:
        raise GroupingError(f"{name} has no scale for each channel yet: run a training step first")
    return torch.fake_quantize_per_channel_affine(x, module.scale, module.zero_point, axis, *limits)
