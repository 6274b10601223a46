"""The command line of `python -m ocsfast.train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ocsfast.core.errors import ConfigError, OcsfastError
from ocsfast.train.data.catalogue import LOADERS, check_name, load
from ocsfast.train.data.source import Request
from ocsfast.train.experiment import Experiment, make_writable, run_experiment
from ocsfast.train.models import ARCHITECTURES
from ocsfast.train.optional import require
from ocsfast.train.recipes import OPTIMIZERS, RECIPES, Recipe, recipe
from ocsfast.train.report.records import EpochRow
from ocsfast.train.report.table import comparison_table, progress_line

# --quick, which continuous integration runs: every part of the demo, in a few seconds.
QUICK_EPOCHS, QUICK_SUBSET, QUICK_BATCH = 14, 256, 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: those of the command line; None: `sys.argv`'s.

    Returns:
        The exit status: 0, or 2 after a mistake in the arguments or the data.
    """
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        run(options)
    except OcsfastError as error:
        print(f"python -m ocsfast.train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ocsfast.train",
        description="Train a network, and train it again while half of it is pruned away.",
        epilog="Without arguments: the demo, on scikit-learn's handwritten digits.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=_data_name,
        default="digits",
        metavar="NAME",
        help=f"{', '.join(LOADERS)}, or folder:PATH with PATH/{{train,test}}/<class>/<images>",
    )
    data.add_argument("--data-root", type=Path, default=Path("data"), help="where data sets lie")
    data.add_argument("--download", action="store_true", help="fetch the data set if it is missing")
    data.add_argument("--subset", type=int, metavar="N", help="train on N images only")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="size of a folder's images")
    data.add_argument("--workers", type=int, help="processes that decode a folder too large for memory")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--arch", choices=list(ARCHITECTURES), help="default: digits_resnet for digits, else resnet20"
    )
    training.add_argument("--recipe", choices=RECIPES, default="default", help="what the next five are")
    training.add_argument("--epochs", type=int)
    training.add_argument("--batch-size", type=int)
    training.add_argument("--lr", type=float)
    training.add_argument("--optimizer", choices=OPTIMIZERS, help="of the default recipe")
    training.add_argument("--warmup", type=float, metavar="SHARE", help="of the run, such as 0.1")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--pretrained", type=Path, metavar="FILE", help="weights to start from")

    pruning = parser.add_argument_group("pruning")
    pruning.add_argument("--ratio", type=float, default=0.5, help="share of the MACs that is removed")
    which = pruning.add_mutually_exclusive_group()
    which.add_argument("--dense-only", action="store_true", help="leave the one-cycle run out")
    which.add_argument("--prune-only", action="store_true", help="leave the dense run out")

    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the results go")
    parser.add_argument(
        "--quick", action="store_true", help="few epochs, few images: only shows it works"
    )
    return parser


def _data_name(name: str) -> str:
    """The type of --data, whose errors argparse shows."""
    try:
        return check_name(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(options: argparse.Namespace) -> None:
    """Train as the arguments say, printing a line for each epoch and a table at the end."""
    require("matplotlib", "drawing the figures")
    make_writable(options.out)
    device = make_device(options.device)
    arch = options.arch or ("digits_resnet" if options.data == "digits" else "resnet20")
    chosen = choose_recipe(options, arch)
    request = Request(
        root=options.data_root,
        subset=QUICK_SUBSET if options.quick and options.subset is None else options.subset,
        seed=options.seed,
        download=options.download,
        image_size=chosen.image_size,
        resized_crop=chosen.resized_crop,
        device=device,
        workers=min(8, os.cpu_count() or 1) if options.workers is None else options.workers,
    )
    data = load(options.data, request)
    print(
        f"{arch} on {data.name}: {len(data.train)} images to train, {len(data.test)} to test, "
        f"{len(data.classes)} classes; {chosen.epochs} epochs, batches of {chosen.batch_size}, "
        f"ratio {options.ratio:g}, on {device}",
        flush=True,
    )

    def show(row: EpochRow) -> None:
        print(progress_line(row, chosen.epochs), flush=True)

    experiment = Experiment(
        arch=arch,
        ratio=options.ratio,
        recipe=chosen,
        seed=options.seed,
        device=device,
        out=options.out,
        runs="dense" if options.dense_only else "one-cycle" if options.prune_only else "both",
        pretrained=options.pretrained,
    )
    summary = run_experiment(experiment, data, show)
    print(f"\n{comparison_table(summary)}\n")
    if summary.get("cut_by_deadline"):
        print("The choice did not become stable in time: the deadline cut it.")
    for reason in summary.get("stays_dense", []):
        print(f"stayed dense: {reason}")
    print(f"Written to {options.out}/")


def choose_recipe(options: argparse.Namespace, arch: str) -> Recipe:
    """The recipe that was named, with the fields that the arguments change."""
    chosen = recipe(options.recipe, options.data, arch, options.optimizer)
    if options.quick:
        chosen = replace(chosen, epochs=QUICK_EPOCHS, batch_size=QUICK_BATCH)
    given = {
        name: getattr(options, name)
        for name in ("epochs", "batch_size", "lr", "warmup", "image_size")
        if getattr(options, name) is not None
    }
    return replace(chosen, **given)


def make_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--device {name} cannot be used: {reason}") from error
    return device
