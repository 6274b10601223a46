"""Pruning YOLO in the Trainer of ultralytics, by callbacks.

ultralytics is under the AGPL-3.0. Nothing of it stands here, and this module does not import it: its
trainer calls the methods below and passes itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.api.arguments import Inputs, plain
from ocsfast.api.calls import checked_ratio, options_of
from ocsfast.core.errors import ConfigError
from ocsfast.cut.copies import Also
from ocsfast.cut.record import record_of
from ocsfast.integrations.run import PruneRun
from ocsfast.optim.owners import counter

SAVED = "ocsfast_run"  # the attribute of the averaged model in which a checkpoint has the pruner's state


def forward(model: nn.Module, images: Tensor) -> Any:
    """Run a YOLO and return its predictions; pass this function as `Config.forward`.

    Besides its predictions the model returns the feature maps that its heads read, for the loss to see
    how large they are. These are left out here, since what is returned keeps its shape.

    Args:
        model: a model of ultralytics: detection, segmentation, pose, oriented boxes or classification.
        images: [N, channels, H, W] float.

    Returns:
        What the model returns, without the maps.

    Examples:
        A model that returns such a dict.

        >>> import torch, ocsfast
        >>> from torch import nn
        >>> from ocsfast.integrations.ultralytics import forward
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.neck, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        ...     def forward(self, x):
        ...         x = self.neck(x)
        ...         return {"boxes": self.head(x).flatten(2), "feats": [x]}
        >>> images = torch.randn(2, 3, 9, 9)
        >>> ocsfast.group(Detector(), images, forward=forward).num_groups
        8
    """
    return _without_maps(model(images))


def _without_maps(predictions: Any) -> Any:
    """Predictions, nested as they come, without what is called "feats"."""
    if isinstance(predictions, Mapping):
        return {name: _without_maps(x) for name, x in predictions.items() if name != "feats"}
    if isinstance(predictions, (list, tuple)):
        return type(predictions)(map(_without_maps, predictions))
    return predictions


class PruneCallback:
    """Prunes a YOLO while its own trainer trains it: `PruneCallback(0.5).add_to(model)`.

    The trainer's average of the weights is cut with the model, so that `last.pt` and `best.pt` hold the
    cut model from then on. `YOLO("best.pt")` reads it, validates and exports it, without ocsfast too.
    Only to train it on takes this callback: without it ultralytics would build a dense model from the
    configuration, and take over no weights but those that fit. So `YOLO("last.pt")` with this callback
    added resumes, before or after the cut, and `YOLO("best.pt")` with it trains on as it is.

    At the cut the trainer forgets its best result so far, of a model that is no longer there. Early
    stopping counts its epochs from the cut on.

    Attributes:
        run: of the last training: `run.pruner` is the `Pruner`, `run.report` the last `StepReport`.

    Examples:
        In a program of one's own, with `data="coco.yaml"` or another:

        >>> from ocsfast.integrations.ultralytics import PruneCallback
        >>> prune = PruneCallback(0.5)
        >>> def train():
        ...     from ultralytics import YOLO
        ...     model = YOLO("yolo11n.yaml")
        ...     prune.add_to(model)
        ...     model.train(data="coco.yaml", epochs=100)
        >>> prune.run.report.stage
        'observe'
    """

    def __init__(
        self,
        ratio: float,
        example_inputs: Inputs | None = None,
        *,
        also: Iterable[Also] = (),
        **options: Any,
    ) -> None:
        """Say what to prune.

        Args:
            ratio: the share of the target that is removed, between 0 and 1.
            example_inputs: one batch as the model takes it. None: two images of the size that is trained
                with (`imgsz`).
            also: further copies of the model and optimizers that are cut with it, as for `ocsfast.step`;
                the trainer's own average need not be named.
            **options: fields of `Config`. Unless `check_every` is given, a run has 200 checks,
                whose length the trainer tells, but for `time=`. `forward` is this module's, if none is
                given.

        Raises:
            ConfigError: a bad ratio or option. When training begins: the trainer has `time=` and no
                option says how long the run is, it distils the model from another one, or as for
                `ocsfast.attach`.
            GroupingError, StateError: when training begins, as for `ocsfast.attach`.
        """
        self.ratio = checked_ratio(ratio)
        self.example_inputs = example_inputs
        self.also = [*also]
        config = options_of(options.pop("config", None), options)
        self.config = config if config.forward else replace(config, forward=forward)
        self.run = self._begun()
        self._saved: Mapping[str, Any] = {}
        self._steps = 0  # of the optimizer
        self._average: Any = None  # the trainer's

    def add_to(self, model: Any) -> None:
        """Have a `YOLO`, or a trainer, call this from its next training on.

        Args:
            model: what has `add_callback(event, function)`.
        """
        events = ("pretrain_routine_start", "train_start", "train_batch_end", "train_epoch_end")
        for event in (f"on_{name}" for name in events):
            model.add_callback(event, getattr(self, event))

    def on_pretrain_routine_start(self, trainer: Any) -> None:
        """Before the trainer makes its model: from weights of a cut one it has to be a cut one."""
        build = trainer.get_model
        self._saved = {}

        def get_model(cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            if weights is not None and trainer.resume:
                self._saved = getattr(weights, SAVED, {})
            if weights is None or record_of(weights) is None:
                return build(cfg=cfg, weights=weights, verbose=verbose)
            return _to_train_on(weights, trainer.data)

        trainer.get_model = get_model

    def on_train_start(self, trainer: Any) -> None:
        """The optimizer and the average are there, and restored: attach."""
        model, batches = plain(trainer.model), len(trainer.train_loader)
        if hasattr(model, "teacher_model"):
            raise ConfigError(
                "distill_model=: its loss compares feature maps, which would have to keep their widths. "
                "Prune in a run without it"
            )
        if trainer.args.time and not self.config.length():
            raise ConfigError(
                f"time={trainer.args.time}: how many steps the run has shows when it is over. Pass "
                "epochs= or total_steps= to PruneCallback, or epochs= to train() in place of time="
            )
        self.run, self._average = self._begun(trainer), trainer.ema
        self.run.load_state_dict(self._saved)
        self._steps = counter.steps(trainer.optimizer)
        per_epoch = max(1, batches // trainer.accumulate)
        self.run.begin(model, trainer.optimizer, _optimizer_steps(trainer, batches), per_epoch)
        self._end_loading()

    def on_train_batch_end(self, trainer: Any) -> None:
        """The optimizer may have stepped: make a check if one is due."""
        steps = counter.steps(trainer.optimizer)
        if steps == self._steps:  # gradients are still being accumulated
            return
        self._steps = steps
        self._keep_average(trainer)
        cut = self.run.step().cut
        self._end_loading()
        if cut:
            trainer.best_fitness = None
            trainer.stopper.best_fitness = 0.0
            trainer.stopper.best_epoch = trainer.epoch

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Before validation and the checkpoint: put into the average what a resumed run needs."""
        average = trainer.ema.ema if trainer.ema else None
        uncut = self.run.report.stage != "pruned"
        if uncut:
            trainer.stopper.best_epoch = trainer.epoch + 1
        if average is not None and uncut:
            setattr(average, SAVED, dict(self.run.state_dict()))
        elif average is not None:
            vars(average).pop(SAVED, None)

    def _begun(self, trainer: Any = None) -> PruneRun:
        """The pruning of one training."""
        inputs, also = self.example_inputs, self.also
        if trainer is not None and trainer.ema:
            also = [*also, trainer.ema]
        if trainer is not None and inputs is None:
            size = trainer.args.imgsz
            inputs = torch.zeros(2, trainer.data["channels"], size, size)
        return PruneRun(self.ratio, () if inputs is None else inputs, also, {"config": self.config})

    def _keep_average(self, trainer: Any) -> None:
        # After a loss that is not finite the trainer goes back to `last.pt`, with a new average. The cut
        # follows the object that was there when training began.
        if trainer.ema and self._average is not trainer.ema:
            vars(self._average).update(vars(trainer.ema))
            trainer.ema = self._average

    def _end_loading(self) -> None:
        # Here weights of a cut model do not arrive in a dense one, and a checkpoint is a pickle of the
        # average: one with our hooks could not be read without ocsfast.
        if self.run.pruner is not None:
            self.run.pruner.end_loading()


def _to_train_on(cut: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    """A cut model that a checkpoint held, as one to train.

    Raises:
        ConfigError: the data have other classes than it has.
    """
    classes = getattr(cut, "nc", None) or getattr(cut, "yaml", {}).get("nc")
    if classes is not None and classes != data["nc"]:
        raise ConfigError(
            f"the weights are of a cut model with {classes} classes, the data have {data['nc']}: a new "
            "head needs a new layer. Prune with these data, or replace the head's last layers yourself"
        )
    model = copy.deepcopy(cut).float()
    for name, p in model.named_parameters():
        if ".dfl" not in name:  # the trainer freezes these, and complains about all others that are
            p.requires_grad_(True)
    return model


def _optimizer_steps(trainer: Any, batches: int) -> int | None:
    """How many steps the optimizer takes in the whole run; None if that is not known.

    In the warm-up the number of batches in a step grows from 1 to what it is for the rest of the run.
    """
    if trainer.args.time:
        return None
    every, total = trainer.accumulate, batches * trainer.epochs
    warm = min(round(trainer.args.warmup_epochs * batches), batches * (trainer.epochs - 1))
    steps, last = 0, -1
    for batch in range(warm):
        if batch - last >= max(1, round(1 + (every - 1) * batch / warm)):
            steps, last = steps + 1, batch
    return int(steps + (total - 1 - last) // every)
