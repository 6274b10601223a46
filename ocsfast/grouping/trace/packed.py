"""Packed sequences, traced as if all of them were of full length.

How many rows `pack_padded_sequence` packs depends on the lengths in the batch, which no graph can hold.
Which features go together does not depend on them. So while a model is traced or proved, packing keeps
every step of every sequence, and the recurrent layer between packing and padding runs on
[steps, batch, features].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class FullLength(TorchFunctionMode):
    """While it is entered, every packed sequence has all its steps."""

    def __init__(self) -> None:
        super().__init__()
        # By id, the tensors that say how many sequences have each step; how many sequences there are.
        self._batches: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            return self._pack(*args)
        if len(args) > 1 and self._sequences(args[1]):
            if name == "_pad_packed_sequence":
                return self._pad(*args)
            if name in RECURRENT:
                return self._run(func, *args)
        if func is Tensor.__getitem__ and self._sequences(args[0]):
            return self._sequences(args[0])  # of any step: torch asks for the first one, as an integer
        return func(*args, **(kwargs or {}))

    def _sequences(self, tensor: Any) -> int:
        """How many sequences were packed; 0 where the tensor counts none."""
        return self._batches.get(id(tensor), (None, 0))[1]

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """[batch, steps, ..] or [steps, batch, ..] -> ([steps * batch, ..], how many have each step)."""
        x = x.transpose(0, 1) if batch_first else x
        steps, sequences = x.shape[:2]
        counts = torch.full((steps,), sequences, dtype=torch.int64)
        self._batches[id(counts)] = counts, sequences
        return x.flatten(0, 1), counts

    def _pad(
        self, data: Tensor, counts: Tensor, batch_first: bool, value: float, total: int
    ) -> tuple[Tensor, Tensor]:
        """[steps * batch, ..] -> ([batch, steps, ..] or [steps, batch, ..], the sequences' lengths)."""
        sequences = self._sequences(counts)
        steps = data.shape[0] // sequences
        x = data.view(steps, sequences, *data.shape[1:])
        if total > steps:
            x = torch.cat([x, x.new_full((total - steps, *x.shape[1:]), value)])
        lengths = torch.full((sequences,), steps, dtype=torch.int64)
        return (x.transpose(0, 1) if batch_first else x), lengths

    def _run(self, func: Callable[..., Any], data: Tensor, counts: Tensor, *rest: Any) -> Any:
        """A recurrent operator on data [steps * batch, features], run as on [steps, batch, features]."""
        sequences = self._sequences(counts)
        x = data.view(data.shape[0] // sequences, sequences, data.shape[1])
        out, *states = func(x, *rest, False)
        return (out.flatten(0, 1), *states)
