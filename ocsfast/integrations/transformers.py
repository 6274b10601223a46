"""Pruning in the Trainer of transformers, by one more callback."""

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
    """Prunes the Trainer's model while it trains; pass it in `Trainer(callbacks=[...])`.

    The state of the pruning is saved in the trainer_state.json of each checkpoint. With
    `trainer.train(resume_from_checkpoint=True)` a run goes on from a checkpoint of before or after the
    cut. At the cut the Trainer forgets which checkpoint was the best so far, because the cut model could
    not load it. From then on `load_best_model_at_end` and early stopping compare cut models only.

    Attributes:
        run: `run.pruner` is the `Pruner` once training has begun, `run.report` the last `StepReport`.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from ocsfast.integrations.transformers import PruneCallback
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                    intermediate_size=32, image_size=8, patch_size=4, num_labels=2)
        >>> model = ViTForImageClassification(config)
        >>> images = torch.randn(32, 3, 8, 8)
        >>> data = [{"pixel_values": x, "labels": k % 2} for k, x in enumerate(images)]
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=20, save_strategy="no",
        ...                               use_cpu=True, disable_tqdm=True, report_to="none")
        >>> prune = PruneCallback(0.3, {"pixel_values": images[:2]})
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[prune])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> prune.run.report.stage
        'pruned'
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
            example_inputs: one batch as the model takes it, without labels: a dict of keyword arguments,
                or a tensor or a tuple of positional ones. It is moved to the model's device.
            also: copies of the model and further optimizers that are cut with it, as for `ocsfast.step`.
            **options: fields of `Config`. Unless `check_every` is given, a run has 200 checks,
                whose length the Trainer tells. Pass `epochs=` if this run is only a part of a longer
                one. With `uniform=True` only such groups go as the model's config can describe, so that
                `from_pretrained` reads what `save_pretrained` wrote. Without it, use `ocsfast.save` and
                `ocsfast.load`.

        Raises, when training begins:
            ConfigError, GroupingError, StateError: as for `ocsfast.attach`.
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
        # The weights of a checkpoint are loaded between on_init_end and here.
        if not self._resumable:
            logger.warning(
                "a run with this callback cannot be resumed once the model is cut: give it to "
                "Trainer(callbacks=[...]), not to Trainer.add_callback"
            )
        callbacks: Any = state.stateful_callbacks or {}  # from trainer_state.json
        saved = callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and "pruner" in saved["attributes"]:
            self.run.load_state_dict(_decoded(saved["attributes"]["pruner"]))
        batches, per_epoch = kwargs.get("train_dataloader"), None
        if batches is not None and has_length(batches):
            per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps)
        wrapped = kwargs["optimizer"]
        optimizer = getattr(wrapped, "optimizer", wrapped)  # torch's, inside that of accelerate
        self.run.begin(kwargs["model"], optimizer, state.max_steps, per_epoch)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not in on_step_end: the gradients, which some criteria need, are gone by then.
        if self.run.step().cut:
            for best in ("best_metric", "best_model_checkpoint", "best_global_step"):
                if hasattr(state, best):
                    setattr(state, best, None)

    def state(self) -> dict[str, Any]:
        """What is saved in trainer_state.json."""
        return {"args": {}, "attributes": {"pruner": _encoded(dict(self.run.state_dict()))}}


def _encoded(state: dict[str, Any]) -> str:
    """A state with tensors in it as a string, which JSON can hold."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return base64.b64encode(stream.getvalue()).decode()


def _decoded(word: str) -> dict[str, Any]:
    """The state that `_encoded` made a string of."""
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(word)), weights_only=True)
    return state
