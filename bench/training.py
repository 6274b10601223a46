"""A network trained dense and in one cycle, in turn, through the cut, in half precision.

    python bench/training.py --device cuda --images build/gpu/cifar10.pt --seconds 150

ResNet56 in channels_last: dense with torch's fused SGD, one-cycle with `ocsfast.optim.SGD` and half of
its MACs to go, both by bfloat16 autocast, an epoch each in turn, for as many epochs as the seconds
allow. Then a short one-cycle run by float16 autocast with a GradScaler. Forward and backward are
replayed from a CUDA graph, captured anew after the cut: launched one by one, a network of this size is
bound by the host, before the cut and after it.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import records
import torch
from images import Split, load
from timing import warm_up
from torch import Tensor
from torch.nn import functional as F

import ocsfast
from ocsfast.grouping.macs import count_macs
from ocsfast.train.models import build_model

RATIO = 0.5
RATE, WEIGHT_DECAY = 0.1, 5e-4  # the rate is for 128 images a batch
WARMUP = 0.1  # share of the run


class Trainee:
    """One network in training, and what it showed so far."""

    def __init__(self, name: str, dtype: torch.dtype, args: Any, data: Split, epochs: int) -> None:
        torch.manual_seed(0)
        self.name, self.dtype, self.data, self.batch = name, dtype, data, args.batch
        self.device = args.device
        self.arch = args.arch
        self.shape = (data.images.shape[1], *[data.images.shape[2] - 2 * data.pad] * 2)
        model = build_model(args.arch, 10, data.images.shape[1], self.shape[1])
        self.model = model.to(args.device, memory_format=torch.channels_last)
        settings = {"lr": RATE * args.batch / 128, "momentum": 0.9, "nesterov": True}
        settings["weight_decay"] = WEIGHT_DECAY
        self.steps = len(data) // args.batch
        total = self.steps * epochs
        self.pruner = None
        if name == "dense":
            self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **settings)
        else:
            self.optimizer = ocsfast.optim.SGD(self.model.parameters(), fused=True, **settings)
            self.pruner = ocsfast.attach(
                self.model,
                RATIO,
                optimizer=self.optimizer,
                example_inputs=torch.zeros(2, *self.shape, device=args.device),
                total_steps=total,
                check_every=self.steps,
            )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_factor((step + 1) / (total + 1))
        )
        scaled = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(args.device, enabled=scaled)
        self.graphed = args.device == "cuda" and not scaled and not args.eager
        self.graph: torch.cuda.CUDAGraph | None = None
        self.generator = torch.Generator(args.device).manual_seed(0)
        self.epoch = 0
        self.rates: dict[bool, list[float]] = {False: [], True: []}  # images a second, by "cut already"
        self.at_cut: tuple[float, float] | None = None
        self.dense_macs = self.macs()

    def forward_backward(self, x: Tensor, y: Tensor) -> Tensor:
        # In a graph, casts of weights that were cached by an earlier step would be stale.
        with torch.autocast(self.device, self.dtype, cache_enabled=not self.graphed):
            loss = F.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def launched(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self.forward_backward(x, y)

    def capture(self, x: Tensor, y: Tensor) -> None:
        """Forward and backward as a graph; its gradients are the model's from then on."""
        self.x, self.y = x.clone(), y.clone()
        warm_up(lambda: self.launched(self.x, self.y))
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.forward_backward(self.x, self.y)
        self.graph = graph

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        if self.graphed and self.graph is None:
            try:
                self.capture(x, y)
            except RuntimeError as error:
                print(f"{self.name}: no graph, step by step instead: {error}", flush=True)
                self.graphed = False
        if self.graph is None:
            return self.launched(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss

    def train_epoch(self) -> tuple[float, float]:
        """Mean loss, and seconds."""
        self.model.train()
        begun, total = clock(self.device), torch.zeros((), device=self.device)
        for x, y in self.data.batches(self.batch, self.generator):
            total += self.loss_of(x, y)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        loss = float(total) / self.steps
        return loss, clock(self.device) - begun

    @torch.no_grad()
    def accuracy(self, test: Split) -> float:
        self.model.eval()
        hits = torch.zeros((), device=self.device)
        with torch.autocast(self.device, self.dtype):
            for x, y in test.batches(1000):
                hits += (self.model(x).argmax(1) == y).sum()
        return 100 * float(hits) / len(test)

    def run_epoch(self, test: Split, rows: Path | None) -> float:
        """Train an epoch and make a check; returns the accuracy after it."""
        was_cut = self.pruner is not None and self.pruner.stage == "pruned"
        loss, seconds = self.train_epoch()
        self.epoch += 1
        images = self.steps * self.batch / seconds
        self.rates[was_cut].append(images)
        accuracy = self.accuracy(test)
        stage, check = "dense", 0.0
        if self.pruner is not None:
            begun = clock(self.device)
            report = ocsfast.step(self.model, RATIO)
            check, stage = clock(self.device) - begun, report.stage
            if report.cut:
                self.graph = None
                self.at_cut = accuracy, self.accuracy(test)
        records.append(
            rows,
            "epoch",
            run=self.name,
            dtype=str(self.dtype).removeprefix("torch."),
            epoch=self.epoch,
            loss=loss,
            accuracy=accuracy,
            seconds=seconds,
            check=check,
            images_a_second=images,
            stage=stage,
        )
        return accuracy

    @torch.no_grad()
    def macs(self) -> int:
        training = self.model.training
        self.model.eval()
        image = torch.zeros(1, *self.shape, device=self.device)
        counted = count_macs(lambda: self.model(image))
        self.model.train(training)
        return counted

    def summary(self, data: str, accuracy: float) -> dict[str, Any]:
        def rate(cut: bool) -> float | None:  # an epoch in which a graph is captured is no measure
            rates = self.rates[cut][1:] or self.rates[cut]
            return statistics.median(rates) if rates else None

        return {
            "run": self.name,
            "model": self.arch,
            "data": data,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": records.device_name(self.device),
            "epochs": self.epoch,
            "batch": self.batch,
            "graph": self.graphed,
            "accuracy": accuracy,
            "before_cut": rate(False),
            "after_cut": rate(True),
            "accuracy_at_cut": self.at_cut,
            "macs": self.dense_macs,
            "macs_left": self.macs(),
            "began": None if self.pruner is None else self.pruner.t_sl,
            "cut": None if self.pruner is None else self.pruner.t_cut,
        }


def rate_factor(done: float) -> float:
    if done < WARMUP:
        return done / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP))))


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--images", type=Path, help="of bench/images.py; else scikit-learn's digits")
    parser.add_argument("--seconds", type=float, default=150.0, help="for all runs together")
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    begun = time.perf_counter()
    if args.quick:
        args.arch, args.batch = "resnet20", 64
    name, splits = load(args.images)
    augment = name != "digits"  # a shifted 8x8 digit loses strokes, a mirrored one its meaning
    if args.quick:
        for split, (x, y) in splits.items():
            every = slice(None, None, max(1, len(x) // 256))  # an archive lists class after class
            splits[split] = x[every][:256], y[every][:256]
    train = Split.of(splits, "train", args.device, augment)
    test = Split.of(splits, "test", args.device, False)
    args.batch = min(args.batch, len(train) // 4)
    epochs = short = 3
    if not args.quick:
        trial = Trainee("dense", torch.bfloat16, args, train, 3)
        trial.train_epoch()  # captures, and lets cuDNN choose
        _, seconds = trial.train_epoch()
        left = args.seconds - (time.perf_counter() - begun)
        # The tests and the checks take about a tenth more; 0.15 is for the run in float16, which takes
        # its steps one by one.
        epochs = max(3, min(100, int(0.85 * left / (2 * 1.1 * seconds))))
        short = max(3, min(10, int(0.15 * left / (2 * 1.1 * seconds))))
        print(f"{seconds:.2f} s an epoch: {epochs} epochs, then {short}", flush=True)
        del trial
    pair = [Trainee(run, torch.bfloat16, args, train, epochs) for run in ("dense", "one-cycle")]
    accuracies = [0.0] * 2
    for _ in range(epochs):
        accuracies = [trainee.run_epoch(test, args.rows) for trainee in pair]
    for trainee, accuracy in zip(pair, accuracies, strict=True):
        records.append(args.rows, "training", **trainee.summary(name, accuracy))
    del pair, trainee
    scaled = Trainee("one-cycle", torch.float16, args, train, short)
    for _ in range(short):
        accuracy = scaled.run_epoch(test, args.rows)
    scale = scaled.scaler.get_scale()
    records.append(args.rows, "training", **scaled.summary(name, accuracy), scale=scale)


if __name__ == "__main__":
    main()
