"""One-cycle pruning in Lightning: one more callback."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from ocsfast.api.arguments import Inputs
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.cut.copies import Also
from ocsfast.integrations.run import PruneRun


class PruneCallback(Callback):
    """Prunes a part of the LightningModule while it trains; give it to `Trainer(callbacks=[...])`.

    Its state lies in Lightning's own checkpoints: `trainer.fit(..., ckpt_path=...)` goes on where one
    was written, before the cut or after it, and a fresh model reads either in `validate`, `test` and
    `predict`. At the cut each `ModelCheckpoint` forgets which were the best so far, which the cut model
    could not load; the files stay. With `strategy="ddp"`, all processes cut alike.

    Attributes:
        run: `run.pruner` is the `Pruner` once training has begun, `run.report` the last report.
    """

    def __init__(
        self,
        ratio: float,
        example_inputs: Inputs,
        *,
        module: str = "model",
        also: Iterable[Also] = (),
        **options: Any,
    ) -> None:
        """Say what to prune.

        Args:
            ratio: the share of the target that is removed, between 0 and 1.
            example_inputs: one batch as that module takes it.
            module: the name of the network in the LightningModule; "" for the LightningModule itself.
            also: what the cut has to follow besides, as for `ocsfast.step`.
            **options: fields of `Config`. Without `check_every`, there are 50 checks in the run, whose
                length Lightning knows; `epochs=` says it where this is but a part of it.
        """
        self.module = module
        self.run = PruneRun(ratio, example_inputs, also, options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run.expect_weights(self._network(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise StateError(
                f"configure_optimizers returns {len(trainer.optimizers)} optimizers: one has to own all "
                "pruned parameters"
            )
        steps = trainer.estimated_stepping_batches
        known = int(steps) if math.isfinite(steps) and steps > 0 else None
        batches = trainer.num_training_batches
        each = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
        self.run.begin(self._network(pl_module), trainer.optimizers[0], known, each)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.run.step().cut:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                    callback.best_k_models = {}
                    callback.best_model_path = callback.kth_best_model_path = ""
                    callback.best_model_score = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.run.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.run.load_state_dict(state_dict)

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            network: nn.Module = pl_module.get_submodule(self.module)
        except AttributeError as error:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise ConfigError(
                f"module={self.module!r}: {type(pl_module).__name__} has no such part; it has {parts}"
            ) from error
        return network
