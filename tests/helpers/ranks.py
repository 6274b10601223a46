"""Two gloo processes on the CPU, and a run whose batches they share."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from helpers.networks import BATCH, EPOCH, Net, batch
from helpers.processes import Running, interpreter
from ocsfast import Pruner

# Where DistributedDataParallel has been used, torch 2.14 and 2.15 leave gloo's threads running after
# destroy_process_group, and now and then a process dies of that as its interpreter ends.
ABORTED = "terminate called without an active exception"
EPOCHS = 14
RANKS = 2


class Smooth(Net):
    """Without batch norm, so that two halves of a batch make the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = self.bn2 = nn.Identity()  # type: ignore[assignment]


def smooth(seed: int = 0) -> Smooth:
    """The same network each time."""
    torch.manual_seed(seed)
    return Smooth()


def spawn(worker: Callable[..., object], folder: Path, *args: object) -> list[int]:
    """Run worker(rank, folder, *args) in two processes of their own, for tests in which one dies.

    Their exit codes are returned; results and errors go into files of the folder.
    """
    port = free_port()
    processes = [
        interpreter(rank).start(_enter, worker, rank, port, folder, *args) for rank in range(RANKS)
    ]
    return [process.code() for process in processes]


def passed(folder: Path, codes: list[int]) -> None:
    """Fail with the ranks' own errors, if there are any."""
    errors = [file.read_text() for file in sorted(folder.glob("error*"))]
    assert codes == [0] * RANKS, "\n".join(errors)


class Ranks:
    """Two processes of one process group, which live from test to test, until one of them fails."""

    def __init__(self) -> None:
        self._channels: list[Connection] = []
        self._processes: list[Running] = []

    def __call__(self, worker: Callable[..., object], *args: object) -> None:
        """Run worker(rank, *args) in both, and fail with what they raise."""
        if not self._channels:
            self._begin()
        for channel in self._channels:
            channel.send((sys.path, pickle.dumps((worker, args))))
        errors = [_answer(channel) for channel in self._channels]
        if any(errors):
            self.end()
            pytest.fail("\n".join(filter(None, errors)))

    def _begin(self) -> None:
        port = free_port()
        with Listener(family="AF_UNIX") as listener:
            for rank in range(RANKS):
                self._processes.append(interpreter(rank).start(_wait, rank, port, listener.address))
                self._channels.append(listener.accept())

    def end(self) -> None:
        """Let the processes end; the next call starts others."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            process.code(10)
        self._channels, self._processes = [], []


def _answer(channel: Connection) -> str | None:
    if not channel.poll(180):
        return "a rank hangs"
    try:
        return str(error) if (error := channel.recv()) else None
    except EOFError:
        return "a rank died"


def free_port() -> str:
    """A port for the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _join(rank: int, port: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)


def _leave() -> None:
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's end: see ABORTED


def _enter(worker: Callable[..., object], rank: int, port: str, folder: Path, *args: object) -> None:
    _join(rank, port)
    try:
        worker(rank, folder, *args)
    except Exception:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise
    _leave()


def _wait(rank: int, port: str, address: str) -> None:
    channel = Client(address)
    _join(rank, port)
    while True:
        try:
            path, job = channel.recv()
        except EOFError:
            _leave()
        try:
            sys.path[:] = path
            worker, args = pickle.loads(job)
            worker(rank, *args)
        except BaseException:
            channel.send(traceback.format_exc())
            os._exit(1)  # the other rank may wait for this one
        gc.collect()
        channel.send(None)


def step(model: nn.Module, optimizer: Optimizer, k: int, rank: int | None = None) -> None:
    """One training step; a rank takes its half of the batch."""
    x, y = batch(k)
    if rank is not None:
        half = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
        x, y = x[half], y[half]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def whole_run(
    model: nn.Module,
    optimizer: Optimizer,
    drive: Callable[[], Pruner | None],
    rank: int | None = None,
    first: int = 0,
    last: int = EPOCHS,
) -> list[Tensor | None]:
    """Train, and call `drive` after each epoch: the masks of the pruner that it returns."""
    masks = []
    for e in range(first, last):
        for k in range(EPOCH):
            step(model, optimizer, e * EPOCH + k, rank)
        pruner = drive()
        masks.append(None if pruner is None or pruner.mask is None else pruner.mask.clone())
    return masks


def same_everywhere(fact: Any) -> None:
    """Every rank says the same."""
    everywhere: list[Any] = [None] * RANKS
    dist.all_gather_object(everywhere, fact)
    assert everywhere[0] == everywhere[1]
