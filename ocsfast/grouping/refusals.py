"""Models that cannot be pruned, refused by name before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ocsfast.core.errors import GroupingError, StateError


def require_prunable(model: nn.Module) -> None:
    """Refuse a model with a part that cannot be cut.

    Raises:
        GroupingError: a scripted or quantized module; a parameter that is not dense, on the meta device,
            or of another dtype than float32, float64, float16 and bfloat16; a buffer on the meta device.
        StateError: a buffer holds NaN.
    """
    for name, module in model.named_modules():
        public = name.partition("._")[0]  # a quantized layer keeps its weights in a private part
        where = f"its part {public}" if public else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise GroupingError(f"{where} is scripted: nothing in it can be cut. Pass its source")
        if _is_quantized(module):
            raise GroupingError(f"{where} is quantized: prune first, and quantize what is left")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise GroupingError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: only float32, float64, "
                "float16 and bfloat16 parameters can be pruned. Register it as a buffer, or convert it"
            )
        if parameter.layout is not torch.strided or isinstance(parameter, nn.UninitializedParameter):
            raise GroupingError(f"{name} is not a dense tensor: run a forward pass or .to_dense() first")
        if parameter.device.type == "meta":
            raise GroupingError(f"{name} is on the meta device: materialize the model first (to_empty)")
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise GroupingError(f"{name} is on the meta device: materialize the model first (to_empty)")
        if buffer.is_floating_point() and buffer.isnan().any():  # infinity is fine: masks hold it
            raise StateError(f"{name} holds NaN: the training has diverged")


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module itself holds integers in the place of weights, packed ones among them.

    Float modules for quantization-aware training lie in the same packages, so these say nothing.
    """
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return any(
        (isinstance(value, Tensor) and value.is_quantized)
        or (type(value) is torch.ScriptObject and "PackedParams" in str(value._type()))
        for value in held
    )
