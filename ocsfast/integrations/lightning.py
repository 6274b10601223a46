"""Pruning in Lightning, by one more callback."""

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
    """Prunes a network inside a LightningModule while it trains; pass it in `Trainer(callbacks=[...])`.

    The state of the pruning is saved in Lightning's own checkpoints. `trainer.fit(..., ckpt_path=...)`
    goes on from a checkpoint of before or after the cut; `validate`, `test` and `predict` read either
    with a fresh model. At the cut each `ModelCheckpoint` forgets which checkpoints were the best so far,
    because the cut model could not load them; the files stay. With `strategy="ddp"` all processes cut
    alike.

    Attributes:
        run: `run.pruner` is the `Pruner` once training has begun, `run.report` the last `StepReport`.

    Examples:
        >>> import logging, torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader
        >>> from ocsfast.integrations.lightning import PruneCallback
        >>> logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        ...     def training_step(self, batch, _):
        ...         inputs, labels = batch
        ...         return nn.functional.cross_entropy(self.model(inputs), labels)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = [(torch.randn(8), k % 2) for k in range(40)]
        >>> prune = PruneCallback(0.5, torch.randn(4, 8))
        >>> trainer = Trainer(max_epochs=4, callbacks=[prune], accelerator="cpu", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False,
        ...                   enable_model_summary=False)
        >>> trainer.fit(Classifier(), DataLoader(data, batch_size=4))
        >>> prune.run.report.stage
        'pruned'
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
            example_inputs: one batch as the network takes it: a tensor, a tuple of arguments, or a dict
                of keyword arguments. It is moved to the network's device.
            module: the attribute of the LightningModule that holds the network; "" for the
                LightningModule itself.
            also: copies of the network and further optimizers that are cut with it, as for
                `ocsfast.step`.
            **options: fields of `Config`. Unless `check_every` is given, a run has 200 checks,
                whose length Lightning tells. Pass `epochs=` if this run is only a part of a longer one.

        Raises, when training begins:
            ConfigError: there is no attribute `module`, or as for `ocsfast.attach`.
            GroupingError, StateError: as for `ocsfast.attach`; StateError also if
                `configure_optimizers` returns several optimizers.
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
        per_epoch = None
        if math.isfinite(batches):
            per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        self.run.begin(self._network(pl_module), trainer.optimizers[0], known, per_epoch)

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
        """The network inside a LightningModule."""
        try:
            network: nn.Module = pl_module.get_submodule(self.module)
        except AttributeError as error:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise ConfigError(
                f"module={self.module!r}: {type(pl_module).__name__} has no such part; it has {parts}"
            ) from error
        return network
