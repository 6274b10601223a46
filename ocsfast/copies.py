"""Everything besides the model that the cut has to follow: averages of it, further optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from ocsfast.errors import StateError
from ocsfast.slicing import unsliceable

Also = nn.Module | Optimizer


class Copies:
    """The modules and optimizers of `also=`; modules are held weakly."""

    def __init__(self, model: nn.Module, also: Iterable[Also]) -> None:
        """Find the copy in each entry: an average keeps it as a submodule, whatever its name.

        Raises:
            StateError: an entry holds no copy of the model, or its state cannot be cut.
        """
        self.optimizers: list[Optimizer] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        for entry in also:
            if isinstance(entry, Optimizer):
                what = unsliceable(entry)
                if what is not None:
                    raise StateError(
                        f"also=: the {type(entry).__name__} optimizer cannot be cut: {what}. Say how "
                        "with ocsfast.register_slicer"
                    )
                self.optimizers.append(entry)
            elif isinstance(entry, nn.Module):
                self._modules.append(weakref.ref(_copy_in(entry, model)))
            else:
                raise StateError(
                    f"also= holds a {type(entry).__name__}: a module or an optimizer is due"
                )

    @property
    def modules(self) -> list[nn.Module]:
        """Those that are still alive."""
        return [module for module in (reference() for reference in self._modules) if module is not None]


def _copy_in(entry: nn.Module, model: nn.Module) -> nn.Module:
    wanted = _shapes(model)
    found = next((module for module in entry.modules() if _shapes(module) == wanted), None)
    if found is None:
        raise StateError(
            f"also= holds a {type(entry).__name__} in which no module has the model's parameters and "
            "buffers, names and shapes: make the copy from this model, before the cut"
        )
    return found


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors}
