"""One-cycle pruning in transformers' Trainer: one more callback."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from transformers.training_args import TrainingArguments

from ocsfast.api.arguments import Inputs
from ocsfast.cut.copies import Also
from ocsfast.integrations.run import PruneRun

logger = logging.getLogger("ocsfast")


class PruneCallback(TrainerCallback, ExportableState):
    """Prunes the trainer's model while it trains; give it to `Trainer(callbacks=[...])`.

    Its state lies in each checkpoint's trainer_state.json, so that
    `trainer.train(resume_from_checkpoint=True)` goes on where the checkpoint was written, before the cut
    or after it. At the cut the Trainer forgets the best checkpoint so far, which the cut model could not
    load: `load_best_model_at_end` and early stopping compare cut models only.

    Attributes:
        run: `run.pruner` is the `Pruner` once training has begun, `run.report` the last report.
    """

    def __init__(
        self,
        ratio: float,
        example_inputs: Inputs,
        *,
        also: Iterable[Also] = (),
        **options: Any,
    ) -> None:
        """Say what to prune.

        Args:
            ratio: the share of the target that is removed, between 0 and 1.
            example_inputs: one batch as the model takes it, without labels: a dict, as a rule.
            also: what the cut has to follow besides, as for `ocsfast.step`.
            **options: fields of `Config`. Without `check_every`, there are 50 checks in the run, whose
                length the Trainer knows; `epochs=` says it where this is but a part of it. With
                `uniform=True` only what the model's config can say goes, so that `from_pretrained` reads
                what `save_pretrained` wrote; without it, use `ocsfast.save` and `ocsfast.load`.
        """
        self.run = PruneRun(ratio, example_inputs, also, options)
        self._resumable = False  # before on_init_end

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._resumable = True
        if kwargs.get("model") is not None:
            self.run.expect_weights(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not self._resumable:  # weights are loaded between on_init_end and here
            logger.warning(
                "a run with this callback cannot be resumed once the model is cut: give it to "
                "Trainer(callbacks=[...]), not to Trainer.add_callback"
            )
        callbacks: Any = state.stateful_callbacks or {}  # as trainer_state.json has them
        saved = callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and "pruner" in saved["attributes"]:
            self.run.load_state_dict(_decoded(saved["attributes"]["pruner"]))
        optimizer = kwargs["optimizer"]  # accelerate's wrapper has torch's inside
        batches, each = kwargs.get("train_dataloader"), None
        if batches is not None and has_length(batches):
            each = math.ceil(len(batches) / args.gradient_accumulation_steps)
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.run.begin(kwargs["model"], optimizer, state.max_steps, each)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not on_step_end: by then the gradients are gone, which some criteria need.
        if self.run.step().cut:
            for best in ("best_metric", "best_model_checkpoint", "best_global_step"):
                if hasattr(state, best):
                    setattr(state, best, None)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json holds of it."""
        return {"args": {}, "attributes": {"pruner": _encoded(dict(self.run.state_dict()))}}


def _encoded(state: dict[str, Any]) -> str:
    """Tensors and all, as a word of JSON."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return base64.b64encode(stream.getvalue()).decode()


def _decoded(word: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(word)), weights_only=True)
    return state
