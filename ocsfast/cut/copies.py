"""What the cut changes besides the model: copies such as moving averages, and further optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.cut.optimizer_state import unsliceable
from ocsfast.cut.removal import Copy

Also = Any  # an entry of `also=`: an optimizer, or an object in which `_copies_in` finds a copy


class Copies:
    """The entries of `also=`.

    Entries are held by weak references, so that the pruner keeps none of them alive. Python has none to
    lists and dicts, which are held as they are.

    Attributes:
        optimizers: the entries that are optimizers.
    """

    def __init__(self, model: nn.Module, also: Iterable[Also]) -> None:
        """Check that each entry holds a copy of the model that can be cut.

        Raises:
            StateError: an entry holds no copy of the model, or its state cannot be cut.
        """
        self.optimizers: list[Optimizer] = []
        self._entries: list[Callable[[], Any]] = []
        single = isinstance(also, (nn.Module, Optimizer)) or not isinstance(also, Iterable)
        entries: Iterable[Any] = () if also is None else [also] if single else also
        for entry in entries:
            if isinstance(entry, Optimizer):
                what = unsliceable(entry)
                if what is not None:
                    raise StateError(
                        f"also=: the {type(entry).__name__} optimizer cannot be cut: {what}. Say how "
                        "with ocsfast.register_slicer"
                    )
                self.optimizers.append(entry)
            else:
                _copies_in(entry, model)
                self._entries.append(_held(entry))

    def of(self, model: nn.Module) -> list[Copy]:
        """The copies of the model in the entries that are still alive.

        They are searched for at each call, because `.to()` replaces an entry's tensors.

        Raises:
            StateError: an entry no longer holds a copy.
        """
        alive = (entry for entry in (hold() for hold in self._entries) if entry is not None)
        return [copy for entry in alive for copy in _copies_in(entry, model)]

    def sharing(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Tensors in the entries that share memory with the model's or a copy's, each with its owner.

        An average may keep such tensors from one update to the next, as ultralytics' ModelEMA does. The
        cut gives their owners other memory, and an average that went on with these would stand still.
        """
        copies = [copy for copy in self.of(model) if isinstance(copy, nn.Module)]
        owners = [t for m in (model, *copies) for t in (*m.parameters(), *m.buffers())]
        places = {_place(t): t for t in owners if _is_whole(t)}
        known = set(map(id, owners))
        entries = (entry for entry in (hold() for hold in self._entries) if entry is not None)
        inside = (t for entry in entries for t in _tensors_in(list(_attributes(entry).values())))
        return [(t, places[_place(t)]) for t in inside if id(t) not in known and _place(t) in places]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Those copies that are modules: `load_state_dict` can be called on them."""
        return [copy for copy in self.of(model) if isinstance(copy, nn.Module)]


def _held(entry: Any) -> Callable[[], Any]:
    """A function that returns the entry, or None once the entry is gone."""
    try:
        return weakref.ref(entry)
    except TypeError:  # a list, a dict, an object with slots
        return lambda: entry


def _copies_in(entry: Any, model: nn.Module) -> list[Copy]:
    """The copies of a model that an entry of `also=` holds: modules, and lists or dicts of tensors.

    A module is a copy if its parameters and buffers have the names and shapes of the model's. A list is
    one if it has the shapes of all parameters, or of those that train, in order. The model itself and
    its own parameters, which an average may hold as well, do not count.

    Raises:
        StateError: there is none; it says which shape differs in a list that nearly fits.
    """
    wanted, near = _shapes(model), ""
    parts = [entry, *_attributes(entry).values()]
    inside = (m for part in parts if isinstance(part, nn.Module) for m in part.modules())
    modules = [m for m in dict.fromkeys(inside) if m is not model and _shapes(m) == wanted]
    copies: list[Copy] = [*modules]
    names = [name for name, _ in model.named_parameters()]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    known = {id(t) for m in (model, *modules) for t in (*m.parameters(), *m.buffers())}
    for where, given in _lists_in(entry):
        if isinstance(given, Mapping):
            named, tensors = list(given), list(given.values())
        else:
            named, tensors = names if len(given) == len(names) else trained, list(given)
        ids = set(map(id, tensors))
        if len(named) != len(tensors) or not wanted.keys() >= set(named) or not ids or ids & known:
            continue
        known |= ids
        pairs = zip(named, (tuple(t.shape) for t in tensors), strict=True)
        wrong = [(name, shape) for name, shape in pairs if shape != wanted[name]]
        if not wrong:
            copies.append(dict(zip(named, tensors, strict=True)))
        elif not near:
            near = f" {where} has {wrong[0][1]} where {wrong[0][0]} is {wanted[wrong[0][0]]}."
    if not copies:
        raise StateError(
            f"also= holds a {type(entry).__name__} in which nothing is a copy of the model.{near} "
            "Accepted are, as the entry, an attribute of it, or what its parameters() gives: a module "
            "with the model's parameters and buffers, names and shapes; or tensors with the shapes of "
            f"its {len(names)} parameters in order, or of the {len(trained)} that train. Make it from "
            "this model, before the cut; in a resumed run load the model's weights first"
        )
    return copies


def _lists_in(entry: Any) -> Iterator[tuple[str, list[Tensor] | Mapping[str, Tensor]]]:
    """Every list of tensors, or dict of them by name, in an entry; and in words, where it lies."""
    for name, value in {"it": entry, **_attributes(entry)}.items():
        inside = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, (list, tuple, Mapping)) and all(isinstance(t, Tensor) for t in inside):
            yield f"its {name}" if name != "it" else name, value  # type: ignore[misc]
    if callable(getattr(entry, "parameters", None)):
        try:
            given = list(entry.parameters())
        except Exception:  # a method that happens to have this name
            return
        if all(isinstance(t, Tensor) for t in given):
            yield "what its parameters() gives", given


def _tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dicts of these."""
    if isinstance(value, Tensor):
        if _is_whole(value):
            yield value
    elif isinstance(value, (list, tuple, Mapping)) and depth < 4:
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part, depth + 1)


def _is_whole(tensor: Tensor) -> bool:
    """Whether its elements lie in memory of its own process."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.numel() > 0 and not tensor.is_meta


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where its elements lie, and as what."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _attributes(entry: Any) -> dict[str, Any]:
    """The attributes of an object, none if it has no `__dict__`."""
    return dict(getattr(entry, "__dict__", {}))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter and buffer, by name."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors}
